"""The backward of attention: what its kernels start from, and the sum that all of them need.

    P = exp(S − max) / sum,   dP = dropout(dO Vᵀ),   dS = P ∘ (dP − Δ),   Δ = rowsum(dO ∘ O) − dLSE
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = dropout(P)ᵀ dO,   dbias = dmask = sums of dS

Tiling     one kernel for each of: Δ, here; dQ, a program owning queries and walking over keys; dK and dV, a program
           owning keys of one key head and walking over all queries of its group; dmask. Each forms its scores again.
           Nothing is added atomically: a program writes what it owns, and torch adds up the partial sums of a bias.
Precision  products in the inputs' dtype with float32 sums; P and dS rounded to the inputs' dtype for theirs.
Limits     head dims up to 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import load_tokens
from mmkernels.triton.attention_inputs import Attention, Strides, token_strides
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, next_power_of_2, odd
from mmkernels.triton.math import number


@triton.jit(do_not_specialize=["query_length", "heads"])
def _deltas(
    grad_out,  # [B, Hq, Lq, Dv], or packed as [rows, Hq, Dv]
    out,
    grad_log_sum,  # [B, Hq, Lq] or None
    deltas,  # [B, Hq, Lq], or [Hq, rows]
    query_length,
    heads,
    grad_strides,
    out_strides,
    log_sum_strides,  # batch, head, token, odd
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    blocks = tl.cdiv(query_length, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    slice = tl.program_id(0) // blocks
    b, h = tl.cast(slice // heads, tl.int64), tl.cast(slice % heads, tl.int64)
    g_base = grad_out + b * grad_strides[0] + h * grad_strides[1]
    g = load_tokens(g_base, grad_strides[2], m, query_length, DV, BLOCK_DV)
    o_base = out + b * out_strides[0] + h * out_strides[1]
    o = load_tokens(o_base, out_strides[2], m, query_length, DV, BLOCK_DV)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if grad_log_sum is not None:
        at = b * number(log_sum_strides[0]) + h * number(log_sum_strides[1])
        at += m.to(tl.int64) * number(log_sum_strides[2])
        delta -= tl.load(grad_log_sum + at, mask=m < query_length, other=0.0).to(tl.float32)
    tl.store(deltas + slice.to(tl.int64) * query_length + m, delta, mask=m < query_length)


@dataclass(frozen=True)
class Queries:
    """A stream of queries and what its forward left."""

    query: Tensor  # [B, Hq, Lq, D], or packed [rows, Hq, D]
    grad_out: Tensor
    out: Tensor
    row_max: Tensor  # [B, Hq, Lq], or [Hq, rows]
    log_sum: Tensor
    grad_log_sum: Tensor | None
    batch: int
    longest: int  # Lq, or of the longest member

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def statistics_strides(self) -> Strides:
        return tuple(self.row_max.stride()[:2]) if self.row_max.dim() == 3 else (0, self.row_max.stride(0))

    def deltas(self) -> Tensor:
        """Δ, laid out as row_max."""
        deltas = self.row_max.new_empty(self.row_max.shape)
        packed = self.query.dim() == 3
        batch, rows = (1, self.query.shape[0]) if packed else (self.batch, self.query.shape[2])
        log_sum_strides: Strides = (0, 0, 0)
        if self.grad_log_sum is not None:
            strides = self.grad_log_sum.stride()
            log_sum_strides = (0, *strides) if packed else tuple(strides)
        dv = self.out.shape[-1]
        block = max(next_power_of_2(dv), 16)
        launch(
            _deltas,
            (batch * self.heads * ceil_div(rows, 8),),
            *(self.grad_out, self.out, self.grad_log_sum, deltas),
            *(rows, self.heads, token_strides(self.grad_out), token_strides(self.out), odd(log_sum_strides)),
            DV=dv,
            BLOCK_DV=block,
            config=Config({"BLOCK_M": 8}, num_warps=4 if self.query.dtype == torch.float32 else 2),
        )
        return deltas


def options(attention: Attention, query: Tensor, heads: int) -> dict[str, Any]:
    return {
        "GROUP": heads // max(attention.keys[0].shape[1], 1),
        "BOTTOM_RIGHT": attention.bottom_right,
        "MASKED": attention.masked,
        "DROPOUT": attention.dropout_p > 0,
        "PRECISION": dot_precision(query),
        **attention.padded_dims(),
    }
