"""What the tests of the row ops share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DTYPES = [pytest.param(t, id=str(t)[6:]) for t in (torch.float32, torch.bfloat16, torch.float16)]


def strided(tensor: Tensor) -> Tensor:
    """The same values as a leaf: leading dims in the other order, with gaps, the last from an odd offset."""
    dims = tensor.dim()
    order = [*reversed(range(dims - 1)), dims - 1]
    source = tensor.detach().permute(order)
    wide = torch.full((*source.shape[:-1], source.shape[-1] + 3), torch.nan).to(tensor.dtype)
    wide[..., 1:-2] = source
    return wide[..., 1:-2].permute([order.index(d) for d in range(dims)]).requires_grad_(tensor.requires_grad)
