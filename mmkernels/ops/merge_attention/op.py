"""Registration of merge_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.merge_attention import reference


class Arguments(NamedTuple):
    outputs: Sequence[Tensor]
    lses: Sequence[Tensor]


def _in_own_order(tensor: Tensor) -> Tensor:
    return empty_in_order_of(tensor, tensor.shape)


def _merge_attention_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    outputs, lses = a
    return _in_own_order(outputs[0]), _in_own_order(lses[0])


def _triton_supports(a: Arguments) -> str | None:
    outputs, lses = a
    first = outputs[0]
    if len(outputs) > 64:
        return f"{len(outputs)} parts are more than the 64 that a program takes"
    if first.shape[-1] > 8192:
        return f"{first.shape[-1]} features are more than the 8192 that a program holds"
    return None if lses[0].numel() < 2**31 else f"{lses[0].numel()} rows are counted in 32 bits"


merge_attention_op = DifferentiableOp(
    "merge_attention",
    Arguments,
    outputs="Tensor out, Tensor lse",
    reference=reference.merge_attention,
    fake=_merge_attention_fake,
    triton=TritonKernels(_triton_supports),
    gradient=lambda leaf, _: _in_own_order(leaf),
)
