"""Registration of varlen_cross_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._arguments import SymInt
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import TritonKernels
from mmkernels.ops._attention_checks import too_wide_for_triton
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.varlen_cross_attention import reference


class Arguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: SymInt
    max_seqlen_k: SymInt
    window_left: int
    window_right: int
    bottom_right: bool
    scale: float | None
    softcap: float
    sinks: Tensor | None
    return_lse: bool


def _varlen_cross_attention_fake(a: Arguments) -> tuple[Tensor, ...]:
    query, (rows, heads, _) = a.query, a.query.shape
    out = empty_in_order_of(query, (rows, heads, a.value.shape[2]))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((rows, heads) if a.return_lse else (0,), dtype=wide)
    return out, lse, query.new_empty((2, heads, rows), dtype=wide)


def _triton_supports(a: Arguments) -> str | None:
    if a.sinks is not None:
        return "its kernels have no sinks"
    return too_wide_for_triton(a.query, a.value)


varlen_cross_attention_op = DifferentiableOp(
    "varlen_cross_attention",
    Arguments,
    outputs="Tensor out, Tensor lse",
    saved="Tensor stats",  # row_max and log_sum
    reference=reference.varlen_cross_attention,
    reference_saved=reference.softmax_stats,
    fake=_varlen_cross_attention_fake,
    triton=TritonKernels(_triton_supports),
    keeps=EVERYTHING_AND_OUTPUTS,
    gradient=lambda leaf, _: empty_in_order_of(leaf, leaf.shape),
)
