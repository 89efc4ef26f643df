"""Registration of split_attention_pool: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops._pool import pooled_fake, stacked, too_many_modalities
from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import activate
from mmkernels.ops.split_attention_pool import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    activation: str | None
    presence: Tensor | None


# Activations whose derivative follows from their value alone.
_FROM_OUTPUT = (None, "relu", "tanh", "sigmoid")


def _split_attention_pool_fake(a: Arguments) -> tuple[Tensor, ...]:
    xs, weight1, activation = a.xs, a.weight1, a.activation
    pooled, batch, count = pooled_fake(xs)
    hidden = pooled.new_empty((batch, weight1.shape[0]))
    preactivation = hidden.new_empty(0 if activation in _FROM_OUTPUT else hidden.shape)
    weights = pooled.new_empty((batch, count, pooled.shape[1]))
    return pooled, weights, pooled.new_empty(pooled.shape), hidden, preactivation


def _split_attention_pool_saved(*fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    xs, weight1, bias1, _, _, activation, presence = fields
    total = stacked(xs, presence)[0].sum(1)
    preactivation = linear(total, weight1, bias1)
    hidden = activate(preactivation, activation)
    return total, hidden, preactivation.new_empty(0) if activation in _FROM_OUTPUT else preactivation


split_attention_pool_op = DifferentiableOp(
    "split_attention_pool",
    Arguments,
    outputs="Tensor pooled, Tensor weights",
    saved="Tensor sum, Tensor hidden, Tensor preactivation",  # g, z, and W₁ g + b₁ where z's derivative needs it
    reference=reference.split_attention_pool,
    reference_saved=_split_attention_pool_saved,
    fake=_split_attention_pool_fake,
    cpu=NativeKernels(weights=("weight1", "weight2")),
    triton=TritonKernels(lambda a: too_many_modalities(a.xs)),
    keeps=EVERYTHING_AND_OUTPUTS,
)
