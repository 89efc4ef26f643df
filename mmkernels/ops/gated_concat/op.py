"""Registration of gated_concat: schema, shapes of its outputs, backends."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.gated_concat import reference


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None


def _gated_concat_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    x, y, weight, _ = a
    lead = x.shape[:-1]
    out = x.new_empty((*lead, x.shape[-1] + y.shape[-1] + 1))
    return out, out.new_empty((math.prod(lead), weight.shape[0]))


def _gated_concat_saved(*fields: Any) -> tuple[Tensor]:
    x, y, weight, bias = fields
    gate = reference.gate(x, y, weight, bias)
    return (gate.reshape(math.prod(gate.shape[:-1]), gate.shape[-1]).contiguous(),)


gated_concat_op = DifferentiableOp(
    "gated_concat",
    Arguments,
    outputs="Tensor out",
    saved="Tensor gate",  # [rows, Kx or 1]
    reference=reference.gated_concat,
    reference_saved=_gated_concat_saved,
    fake=_gated_concat_fake,
    cpu=NativeKernels(weights=("weight",)),
    triton=TritonKernels(),
)
