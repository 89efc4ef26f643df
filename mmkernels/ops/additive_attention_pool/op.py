"""Registration of additive_attention_pool: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops._pool import pooled_fake, too_many_modalities
from mmkernels.ops.additive_attention_pool import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    weight: Tensor
    vector: Tensor
    bias: Tensor | None
    query: Tensor | None
    query_weight: Tensor | None
    presence: Tensor | None


def _additive_attention_pool_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    xs, weight = a.xs, a.weight
    pooled, batch, count = pooled_fake(xs)
    return pooled, pooled.new_empty((batch, count)), pooled.new_empty((batch, count * weight.shape[0]))


additive_attention_pool_op = DifferentiableOp(
    "additive_attention_pool",
    Arguments,
    outputs="Tensor pooled, Tensor weights",
    saved="Tensor activations",  # tanh(…), [B, M·A]
    reference=reference.additive_attention_pool,
    reference_saved=reference.saved_activations,
    fake=_additive_attention_pool_fake,
    cpu=NativeKernels(weights=("weight", "query_weight")),
    triton=TritonKernels(lambda a: too_many_modalities(a.xs)),
    keeps=EVERYTHING_AND_OUTPUTS,
)
