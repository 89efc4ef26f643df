"""What the tests of the fusion ops share: dtypes, memory layouts, masks of presence, records of allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DTYPES = [pytest.param(t, id=str(t)[6:]) for t in (torch.float32, torch.bfloat16, torch.float16)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
few_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2])

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu")

# Two-dimensional tensors with the same values, laid out otherwise in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns of a wider matrix": lambda x: F.pad(x, (3, 5))[:, 3:-5],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "last dim strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one element expanded": lambda x: x[:1, :1].expand_as(x),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def leaf(*shape: int, dtype: torch.dtype = torch.float32, gain: float = 1.0) -> Tensor:
    """A random tensor that requires grad."""
    return (torch.randn(shape) * gain).to(dtype).requires_grad_()


def flat(values: Sequence[object]) -> list[Tensor]:
    """All tensors among the values, those inside lists included."""
    found: list[Tensor] = []
    for value in values:
        found += flat(value) if isinstance(value, (list, tuple)) else [value] * isinstance(value, Tensor)
    return found


def presence_patterns(rows: int, count: int) -> dict[str, Tensor]:
    """Per call and per row, contiguous or not; rows without any modality among them."""
    per_row = torch.rand(rows, count) > 0.4
    per_row[rows // 2] = False
    one_absent = torch.ones(count, dtype=torch.bool)
    one_absent[count // 2] = False
    column = torch.ones(rows, count, dtype=torch.bool)
    column[:, 0] = False
    return {
        "all present": torch.ones(count, dtype=torch.bool),
        "one absent": one_absent,
        "all absent": torch.zeros(count, dtype=torch.bool),
        "per row": per_row,
        "per row, transposed in memory": per_row.T.contiguous().T,
        "per row, one pattern expanded": one_absent.expand(rows, count),
        "one column absent": column,
    }


def spoiled(xs: Sequence[Tensor], presence: Tensor, filler: float) -> list[Tensor]:
    """The modalities with ``filler`` where they are absent."""
    return [torch.where(presence[..., i : i + 1], x.detach(), filler).requires_grad_() for i, x in enumerate(xs)]


def allocations(function: Callable[[], object]) -> list[int]:
    """The size in bytes of every tensor that is allocated during the call, from Python or C++."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
