"""Registration of gated_concat: schema, shapes of its outputs, backends."""

from __future__ import annotations

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, native_backend
from mmkernels.ops.gated_concat import reference


def _gated_concat_fake(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    return (x.new_empty((*x.shape[:-1], x.shape[-1] + y.shape[-1] + 1)),)


gated_concat_op = DifferentiableOp(
    "gated_concat",
    "Tensor x, Tensor y, Tensor weight, Tensor? bias",
    outputs="Tensor out",
    reference=reference.gated_concat,
    fake=_gated_concat_fake,
    cpu=native_backend("gated_concat"),
)
