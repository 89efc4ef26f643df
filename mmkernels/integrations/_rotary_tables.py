"""Tables of rotary embeddings as models hold them, every entry twice, as `norm_rotary` takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEPT = "_mmkernels_table"


def kept(tensor: Tensor, make: Callable[[Tensor], Any]) -> Any:
    """What ``make`` makes of a tensor that a model gives to all its layers, kept with it while it is unchanged.

    No view of it: Python does not see that a view holds its tensor, and would free neither.
    """
    version = -1 if tensor.is_inference() else tensor._version
    known = tensor.__dict__.get(_KEPT)
    if known is None or known[0] != version or version < 0:
        known = (version, make(tensor))
        tensor.__dict__[_KEPT] = known
    return known[1]


def first_half(table: Tensor) -> Tensor | None:
    """(…, R/2) of a table (…, R) whose halves are the same; None of others."""
    half = table.shape[-1] // 2
    first, second = table[..., :half], table[..., half:]
    return first.detach() if torch.equal(first, second) else None


def every_other(table: Tensor) -> Tensor | None:
    """(…, R/2) float32 of a table (…, R) whose neighbours are the same; None of others."""
    if table.shape[-1] % 2:
        return None
    even = table[..., ::2].float().contiguous()
    return even.detach() if torch.equal(even, table[..., 1::2].float()) else None


def real_and_imaginary(table: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of a table of complex numbers."""
    return table.real.contiguous().detach(), table.imag.contiguous().detach()
