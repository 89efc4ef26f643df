"""What the kernels of the attention pools share: their modalities, and which of them are present."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.launch import odd


@triton.jit
def present(presence, inside, row, i, row_stride, modality_stride):
    """Which rows have modality i; all inside where there are no flags."""
    if presence is not None:
        at = presence + row.to(tl.int64) * row_stride + i * modality_stride
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    return inside


def modalities(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """M of [B, D] with one stride of rows."""
    views = tuple(xs[0].unbind(1)) if xs[0].dim() == 3 else tuple(xs)
    return views if all(x.stride(0) == views[0].stride(0) for x in views) else tuple(x.contiguous() for x in views)


def presence_flags(presence: Tensor | None, batch: int, count: int) -> tuple[Tensor | None, int, int]:
    """The flags as [B, M], and their strides."""
    if presence is None:
        return None, 0, 0
    flags = presence.view(torch.uint8).expand(batch, count)
    return flags, flags.stride(0), flags.stride(1)


def needed_modalities(
    xs: Sequence[Tensor], dxs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """The gradients to write, each [B, D], which modalities they are of (``odd``), and their stride of rows."""
    if xs[0].dim() == 3:
        parts = tuple(dxs[0].unbind(1)) if needed[0] else ()
        return parts, odd(range(len(parts))), xs[0].shape[1] * xs[0].shape[2]
    which = [i for i in range(len(xs)) if needed[i]]
    return tuple(dxs[i] for i in which), odd(which), xs[0].shape[1]
