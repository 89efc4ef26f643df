"""Registration of merge_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, native_backend
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.merge_attention import reference


def _in_own_order(tensor: Tensor) -> Tensor:
    return empty_in_order_of(tensor, tensor.shape)


def _merge_attention_fake(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _in_own_order(outputs[0]), _in_own_order(lses[0])


merge_attention_op = DifferentiableOp(
    "merge_attention",
    "Tensor[] outputs, Tensor[] lses",
    outputs="Tensor out, Tensor lse",
    reference=reference.merge_attention,
    fake=_merge_attention_fake,
    cpu=native_backend("merge_attention"),
    gradient=_in_own_order,
)
