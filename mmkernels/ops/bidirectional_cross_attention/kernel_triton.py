"""bidirectional_cross_attention on GPUs: a forward and a backward that form each tile of scores once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.bidirectional_cross_attention.backward_triton import backward
from mmkernels.ops.bidirectional_cross_attention.forward_triton import forward

__all__ = ["backward", "calls", "forward"]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each configuration, with y in one block and in several."""
    import mmkernels as mmk

    def call(x_length: int, y_length: int, dim: int, masked: bool = False) -> Any:
        sides = [new(2, 8, n, dim) for n in (x_length, y_length, x_length, y_length)]
        if dim > 64 and sides[0].dtype == torch.float32:
            return sides[0]
        masks = [new(2, n, dtype=torch.bool) for n in (x_length, y_length)] if masked else [None, None]
        clamp = 5e4 if masked else None
        return mmk.bidirectional_cross_attention(*sides, x_mask=masks[0], y_mask=masks[1], clamp=clamp)

    for dim in (32, 64, 128):
        yield f"2x8 4096x256 d{dim}, masks, clamp", functools.partial(call, 4096, 256, dim, masked=True)
    yield "2x8 4096x64 d64", lambda: call(4096, 64, 64)
    yield "2x8 4096x128 d128", lambda: call(4096, 128, 128)
