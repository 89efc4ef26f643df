"""Registration of gated_fusion: schema, shapes of its outputs, backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.gated_fusion import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    value_weights: Sequence[Tensor]
    value_biases: Sequence[Tensor]
    gate_weight: Tensor
    gate_bias: Tensor | None
    presence: Tensor | None


def _gated_fusion_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    xs, value_weights = a.xs, a.value_weights
    lead, features = xs[0].shape[:-1], value_weights[0].shape[0]
    out = xs[0].new_empty((*lead, features))
    values = out.new_empty((math.prod(lead), len(xs) * features))
    return out, values, torch.empty_like(values)


def _gated_fusion_saved(*args: Any) -> tuple[Tensor, Tensor]:
    weights, values = reference.weights_and_values(*args)  # [*, M, N]
    rows = math.prod(values.shape[:-2]), values.shape[-2] * values.shape[-1]
    return values.reshape(rows), weights.reshape(rows)


gated_fusion_op = DifferentiableOp(
    "gated_fusion",
    Arguments,
    outputs="Tensor out",
    saved="Tensor values, Tensor weights",  # h_i, and what each is weighted by; [rows, M·N]
    reference=reference.gated_fusion,
    reference_saved=_gated_fusion_saved,
    fake=_gated_fusion_fake,
    cpu=NativeKernels(weights=("value_weights", "gate_weight")),
    triton=TritonKernels(),
)
