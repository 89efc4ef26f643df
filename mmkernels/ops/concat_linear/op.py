"""Registration of concat_linear: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, native_backend
from mmkernels.ops.concat_linear import reference


def _concat_linear_fake(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    presence: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = xs[0].new_empty((*xs[0].shape[:-1], weight.shape[0]))
    linear = activation is None and gate is None
    return out, out.new_empty(0) if linear else out.new_empty(out.shape)


def _concat_linear_saved(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    presence: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor]:
    if activation is None and gate is None:
        return (xs[0].new_empty(0),)
    return (reference.projection(xs, weight, bias, presence).contiguous(),)


concat_linear_op = DifferentiableOp(
    "concat_linear",
    "Tensor[] xs, Tensor weight, Tensor? bias, str? activation, Tensor? presence, Tensor? residual, Tensor? gate",
    outputs="Tensor out",
    saved="Tensor preactivation",  # z; empty where the backward needs none of it
    reference=reference.concat_linear,
    reference_saved=_concat_linear_saved,
    fake=_concat_linear_fake,
    cpu=native_backend("concat_linear"),
)
