"""Registration of varlen_cross_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops._attention_checks import too_wide_for_triton
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.varlen_cross_attention import reference


def _varlen_cross_attention_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return_lse = rest[-1]
    rows, heads, _ = query.shape
    out = empty_in_order_of(query, (rows, heads, value.shape[2]))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty((rows, heads) if return_lse else (0,), dtype=wide)
    return out, lse, query.new_empty((2, heads, rows), dtype=wide)


def _triton_supports(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str | None:
    *_, sinks, _ = rest
    if sinks is not None:
        return "its kernels have no sinks"
    return too_wide_for_triton(query, value)


varlen_cross_attention_op = DifferentiableOp(
    "varlen_cross_attention",
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, int window_left, int window_right, bool bottom_right, float? scale, float softcap, "
    "Tensor? sinks, bool return_lse",
    outputs="Tensor out, Tensor lse",
    saved="Tensor stats",  # row_max and log_sum
    reference=reference.varlen_cross_attention,
    reference_saved=reference.softmax_stats,
    fake=_varlen_cross_attention_fake,
    cpu=NativeKernels("varlen_cross_attention"),
    triton=TritonKernels(_triton_supports),
    keeps=EVERYTHING_AND_OUTPUTS,
    gradient=lambda leaf, _: empty_in_order_of(leaf, leaf.shape),
)
