"""Registration of concat_norm_linear: schema, shapes of its outputs, backends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._cuda import misaligned, products_lose
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING, EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops.concat_linear.op import cuda_declines_sizes
from mmkernels.ops.concat_norm_linear import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    norm_weight: Tensor
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    norm: str
    eps: float
    activation: str | None


def _concat_norm_linear_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    xs, weight, activation = a.xs, a.weight, a.activation
    lead = xs[0].shape[:-1]
    out = xs[0].new_empty((*lead, weight.shape[0]))
    preactivation = out.new_empty(0) if activation is None else out.new_empty(out.shape)
    return out, preactivation, out.new_empty((math.prod(lead), 2), dtype=torch.float32)


def _concat_norm_linear_saved(*fields: Any) -> tuple[Tensor, Tensor]:
    xs, norm_weight, norm_bias, weight, bias, norm, eps, activation = fields
    statistics = reference.statistics(xs, norm, eps)
    if activation is None:
        return xs[0].new_empty(0), statistics
    return reference.projection(xs, norm_weight, norm_bias, weight, bias, norm, eps).contiguous(), statistics


def _cuda_supports(a: Arguments) -> str | None:
    xs, norm_weight, norm_bias, weight, bias, _, _, _ = a
    return cuda_declines_sizes(xs, weight) or misaligned(*xs, norm_weight, norm_bias, weight, bias)


def _cuda_loses(a: Arguments) -> str | None:
    xs, weight = a.xs, a.weight
    return products_lose(xs[0].shape[:-1].numel(), weight.shape[0], weight)


concat_norm_linear_op = DifferentiableOp(
    "concat_norm_linear",
    Arguments,
    outputs="Tensor out",
    saved="Tensor preactivation, Tensor statistics",  # z, empty without activation; [rows, 2] float32
    reference=reference.concat_norm_linear,
    reference_saved=_concat_norm_linear_saved,
    fake=_concat_norm_linear_fake,
    cpu=NativeKernels(weights=("weight",)),
    cuda=CudaKernels(_cuda_supports, loses=_cuda_loses),
    triton=TritonKernels(),
    keeps=((EVERYTHING, EVERYTHING_AND_OUTPUTS), lambda a: a.activation is None),  # without activation the output is z
)
