"""Whether two ways of asking for one thing give one result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from environment import DEVICE
from torch import Tensor

from mmkernels.testing import same_bits


def agree(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """The same bits on the CPU; on a GPU the same but for rounding, NaN included.

    There a kernel is compiled anew for other strides and for what is asked of it, and the compiler fuses other products
    into sums; torch's own sums are cut otherwise as well.
    """
    if DEVICE == "cpu":
        return same_bits(a, b)
    return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or not a.is_floating_point() or not a.numel():
        return same_bits([a], [b])
    largest = b.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    allowed = 16 * torch.finfo(b.dtype).eps * largest
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=allowed, equal_nan=True)
