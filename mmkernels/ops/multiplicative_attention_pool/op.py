"""Registration of multiplicative_attention_pool: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops._pool import pooled_fake, too_many_modalities
from mmkernels.ops._products import matmul
from mmkernels.ops.multiplicative_attention_pool import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    query: Tensor
    weight: Tensor | None
    scale: float
    presence: Tensor | None


def _multiplicative_attention_pool_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    xs, weight = a.xs, a.weight
    pooled, batch, count = pooled_fake(xs)
    projected = pooled.new_empty(0 if weight is None else pooled.shape)
    return pooled, pooled.new_empty((batch, count)), projected


def _multiplicative_attention_pool_saved(*fields: Any) -> tuple[Tensor]:
    _, query, weight, _, _ = fields
    return (query.new_empty(0) if weight is None else matmul(query, weight),)


def _triton_supports(a: Arguments) -> str | None:
    xs = a.xs
    if reason := too_many_modalities(xs):
        return reason
    width = int(xs[0].shape[-1])
    return None if width <= 8192 else f"{width} features are more than the 8192 that a program holds"


multiplicative_attention_pool_op = DifferentiableOp(
    "multiplicative_attention_pool",
    Arguments,
    outputs="Tensor pooled, Tensor weights",
    saved="Tensor projected",  # q W, [B, D], where there is a W
    reference=reference.multiplicative_attention_pool,
    reference_saved=_multiplicative_attention_pool_saved,
    fake=_multiplicative_attention_pool_fake,
    cpu=NativeKernels(weights=("weight",)),
    triton=TritonKernels(_triton_supports),
    keeps=EVERYTHING_AND_OUTPUTS,
)
