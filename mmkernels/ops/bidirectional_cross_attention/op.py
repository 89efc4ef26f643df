"""Registration of bidirectional_cross_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import TritonKernels
from mmkernels.ops.bidirectional_cross_attention import reference
from mmkernels.ops.cross_attention.op import empty_in_order_of


class Arguments(NamedTuple):
    x_query: Tensor
    y_key: Tensor
    x_value: Tensor
    y_value: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    scale: float | None
    clamp: float | None


def _bidirectional_cross_attention_fake(a: Arguments) -> tuple[Tensor, ...]:
    x_query, y_key, x_value = a.x_query, a.y_key, a.x_value
    width = x_value.shape[3]
    wide = torch.float64 if x_query.dtype == torch.float64 else torch.float32
    sides = (x_query, y_key)
    outs = [empty_in_order_of(side, (*side.shape[:3], width)) for side in sides]
    return (*outs, *(side.new_empty((3, *side.shape[:3]), dtype=wide) for side in sides))


def _gradient(leaf: Tensor, _: str) -> Tensor:
    return empty_in_order_of(leaf, leaf.shape) if leaf.dim() == 4 else leaf.new_empty(leaf.shape)


def _triton_supports(a: Arguments) -> str | None:
    x_query, x_value = a.x_query, a.x_value
    widest, most = max(x_query.shape[3], x_value.shape[3]), 64 if x_query.dtype == torch.float32 else 128
    return None if widest <= most else f"a head dim of {widest} is more than the {most} that a program holds"


bidirectional_cross_attention_op = DifferentiableOp(
    "bidirectional_cross_attention",
    Arguments,
    outputs="Tensor x_out, Tensor y_out",
    saved="Tensor x_stats, Tensor y_stats",  # [3, B, H, L]: row_max, a constant shift, log_sum, what rounds row_max
    reference=reference.bidirectional_cross_attention,
    reference_saved=reference.softmax_stats,
    fake=_bidirectional_cross_attention_fake,
    triton=TritonKernels(_triton_supports),
    keeps=EVERYTHING_AND_OUTPUTS,
    gradient=_gradient,
)
