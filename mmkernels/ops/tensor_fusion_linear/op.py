"""Registration of tensor_fusion_linear: schema, shape of its output, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.tensor_fusion_linear import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None
    presence: Tensor | None


def _tensor_fusion_linear_fake(a: Arguments) -> tuple[Tensor]:
    xs, weight, _, _ = a
    return (weight.new_empty((xs[0].shape[0], weight.shape[0])),)


tensor_fusion_linear_op = DifferentiableOp(
    "tensor_fusion_linear",
    Arguments,
    outputs="Tensor out",
    reference=reference.tensor_fusion_linear,
    fake=_tensor_fusion_linear_fake,
    cpu=NativeKernels(weights=("weight",)),
    triton=TritonKernels(),
    keeps=Kept({"weight": "xs presence", "bias": ""}, never="bias"),
)
