"""merge_embeddings on NVIDIA GPUs, in CUDA C++: csrc/merge_embeddings/merge_embeddings_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library, aligned
from mmkernels.ops.merge_embeddings.op import Arguments
from mmkernels.ops.merge_embeddings.reference import check_count

_CHUNK = 1024  # tokens of a count, the kernel's kMergeChunk
_UNCOUNTED = 4096  # up to so many tokens every block counts the mask itself, which is faster than another launch


def _counts(mask: Tensor) -> Tensor | None:
    """Where the kernel counts the True positions of each chunk."""
    tokens = mask.numel()
    return None if tokens <= _UNCOUNTED else mask.new_empty(-(-tokens // _CHUNK), dtype=torch.int32)


def forward(kernels: Library, a: Arguments, training: bool) -> Tensor:
    text, modals, mask, check = a
    if check:
        check_count(sum(m.shape[0] for m in modals), mask)
    out = text.new_empty(text.shape)
    if out.numel():
        kernels("merge_embeddings_fwd", text, modals, mask.contiguous(), _counts(mask), out)
    return out


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    text, modals, mask, _ = a
    (g,) = grads
    of_text, *of_modals = needed[: 1 + len(modals)]
    dtext = text.new_empty(text.shape) if of_text else None
    dmodals = [m.new_empty(m.shape if n else 0) for m, n in zip(modals, of_modals, strict=True)]
    if text.shape[2]:  # without tokens there are rows that no token took
        kernels("merge_embeddings_bwd", aligned(g), modals, mask.contiguous(), _counts(mask), dtext, dmodals)
    return [text.new_empty(0) if dtext is None else dtext, *dmodals, text.new_empty(0)]
