"""Registration of gated_fusion: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, native_backend
from mmkernels.ops.gated_fusion import reference


def _gated_fusion_fake(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    presence: Tensor | None,
) -> tuple[Tensor]:
    return (xs[0].new_empty((*xs[0].shape[:-1], value_weights[0].shape[0])),)


gated_fusion_op = DifferentiableOp(
    "gated_fusion",
    "Tensor[] xs, Tensor[] value_weights, Tensor[] value_biases, Tensor gate_weight, Tensor? gate_bias, "
    "Tensor? presence",
    outputs="Tensor out",
    reference=reference.gated_fusion,
    fake=_gated_fusion_fake,
    cpu=native_backend("gated_fusion"),
)
