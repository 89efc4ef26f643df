"""Registration of concat_tokens and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._cuda import misaligned, rows_lose
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops.concat_tokens import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    type_embedding: Tensor | None
    position_embeddings: Sequence[Tensor]
    position_sources: Sequence[int]
    norm: str | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    out_dtype: torch.dtype | None


def _concat_tokens_fake(a: Arguments) -> tuple[Tensor]:
    batch, _, features = a.xs[0].shape
    return (a.xs[0].new_empty((batch, sum(x.shape[1] for x in a.xs), features), dtype=a.out_dtype or a.xs[0].dtype),)


def _native_supports(a: Arguments) -> str | None:
    return "out_dtype float64 is served by the reference alone" if a.out_dtype == torch.float64 else None


def _cuda_supports(a: Arguments) -> str | None:
    xs, type_embedding, position_embeddings, _, norm, norm_weight, norm_bias, _, _ = a
    if reason := _native_supports(a):
        return reason
    features = xs[0].shape[2]
    if features % 8 or (norm is not None and features > 4096):
        return f"{features} features: its kernel takes multiples of 8, with a norm up to 4096"
    if len(xs) > 32:
        return f"{len(xs)} sources, more than 32"
    return misaligned(*xs, type_embedding, *position_embeddings, norm_weight, norm_bias)


def _triton_supports(a: Arguments) -> str | None:
    features = a.xs[0].shape[2]
    if features > 4096:
        return f"{features} features are more than the 4096 that a program holds"
    return f"{len(a.xs)} sources, more than 32" if len(a.xs) > 32 else _native_supports(a)


_KEPT = (
    Kept({"xs": "", "type_embedding": "", "position_embeddings": ""}),  # without a norm
    Kept({"norm_bias": ""}, never="norm_bias"),
)

concat_tokens_op = DifferentiableOp(
    "concat_tokens",
    Arguments,
    outputs="Tensor out",
    reference=reference.concat_tokens,
    fake=_concat_tokens_fake,
    cpu=NativeKernels(supports=_native_supports),
    cuda=CudaKernels(_cuda_supports, loses=lambda a: rows_lose(sum(x.numel() for x in a.xs))),
    triton=TritonKernels(_triton_supports),
    keeps=(_KEPT, lambda a: a.norm is not None),
)
