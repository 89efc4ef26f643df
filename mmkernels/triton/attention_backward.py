"""The backward of attention: streams of queries over segments of keys.

    P = exp(S − max) / sum,   dP = dropout(dO Vᵀ),   dS = P ∘ (dP − Δ),   Δ = rowsum(dO ∘ O) − dLSE
    dQ = scale · dS K,   dK = scale · dSᵀ Q,   dV = dropout(P)ᵀ dO,   dbias = sums of dS

Tiling     one kernel for each of: Δ; dQ, a program owning queries and walking over keys; dK and dV, a program owning
           keys of one key head and walking over all queries of its group. Each forms its scores again. Nothing is
           added atomically: a program writes what it owns, and torch adds up the partial sums of a bias.
Precision  products in the inputs' dtype with float32 sums; P and dS rounded to the inputs' dtype for theirs.
Limits     head dims up to 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import (
    finite,
    key_range,
    load_statistics,
    load_tokens,
    query_range,
    score_gradients,
    store_tokens,
)
from mmkernels.triton.attention_forward import (
    LENGTHS,
    RANDOM,
    Attention,
    Strides,
    segment_strides,
    token_strides,
)
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, odd, target
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


@triton.jit(do_not_specialize=LENGTHS + RANDOM)
def _query_gradient(
    query,  # [B, Hq, Lq, D], or packed as [rows, Hq, D]
    grad_out,
    dq,  # or None
    bias_sums,  # [programs, segments, 2, BLOCK_M] or None: of each query the sums of dS and of P over a segment
    row_maxes,  # [B, Hq, Lq], or [Hq, rows]
    log_sums,
    deltas,
    keys,
    values,
    padding,
    mask,
    stream_bias,
    query_ends,
    key_ends,
    query_length,
    heads,
    key_lengths,
    query_strides,
    grad_strides,
    dq_strides,
    statistics_strides,
    key_strides,
    value_strides,
    mask_strides,
    bias_stride,
    window_left,
    window_right,
    seed_low,
    seed_high,
    offset,
    threshold,
    kept_scale,
    scale,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    blocks = tl.cdiv(query_length, BLOCK_M)
    first = tl.program_id(0) % blocks * BLOCK_M
    slice = tl.program_id(0) // blocks
    b, h = tl.cast(slice // heads, tl.int64), tl.cast(slice % heads, tl.int64)
    length = query_length
    key_base, row = b * 0, b * 0
    if query_ends is not None:
        row = tl.load(query_ends + b).to(tl.int64)
        length = (tl.load(query_ends + b + 1) - row).to(tl.int32)
        key_base = tl.load(key_ends + b).to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    q_base = query + b * query_strides[0] + h * query_strides[1] + row * query_strides[2]
    q = load_tokens(q_base, query_strides[2], m, length, D, BLOCK_D)
    g_base = grad_out + b * grad_strides[0] + h * grad_strides[1] + row * grad_strides[2]
    g = load_tokens(g_base, grad_strides[2], m, length, DV, BLOCK_DV)
    statistics = b * number(statistics_strides[0]) + h * number(statistics_strides[1]) + row
    row_max, log_sum, delta = load_statistics(
        row_maxes + statistics, log_sums + statistics, deltas + statistics, m, length
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    for j in tl.static_range(len(keys)):
        key_length = number(key_lengths[j])
        if key_ends is not None:
            key_length = (tl.load(key_ends + b + 1) - key_base).to(tl.int32)
        if padding[j] is not None:
            key_length = tl.minimum(tl.maximum(tl.load(padding[j] + b), 0), key_length).to(tl.int32)
        diagonal = 0
        if BOTTOM_RIGHT:
            diagonal = key_length - length
        begin, end = key_range(first, BLOCK_M, diagonal, key_length, window_left, window_right, BLOCK_N)
        if first >= length:
            end = begin
        bias = stream_bias
        if stream_bias is not None:
            bias = tl.load(stream_bias + h * bias_stride + j).to(tl.float32)
            if bias == -float("inf"):
                end = begin
        k_base = keys[j] + b * key_strides[3 * j] + h // GROUP * key_strides[3 * j + 1]
        k_base += key_base * key_strides[3 * j + 2]
        v_base = values[j] + b * value_strides[3 * j] + h // GROUP * value_strides[3 * j + 1]
        v_base += key_base * value_strides[3 * j + 2]
        ds_sum, p_sum = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            k = load_tokens(k_base, key_strides[3 * j + 2], n, key_length, D, BLOCK_D)
            v = load_tokens(v_base, value_strides[3 * j + 2], n, key_length, DV, BLOCK_DV)
            p, ds, derivative = score_gradients(
                q, k, v, g, row_max, log_sum, delta, m, n, length, key_length, diagonal, mask, mask_strides[2],
                mask_strides[3], bias, slice, seed_low, seed_high, offset, threshold, kept_scale, scale, softcap,
                window_left, window_right, MASKED, DROPOUT, PRECISION,
            )  # fmt: skip
            if bias_sums is not None:
                ds_sum += tl.sum(ds, 1)
                p_sum += tl.sum(p, 1)
            if MASKED:
                k = finite(k)
            acc += tl.dot((ds * derivative).to(k.dtype), k, input_precision=PRECISION)
        if bias_sums is not None:
            at = (tl.program_id(0).to(tl.int64) * len(keys) + j) * 2 * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(bias_sums + at, ds_sum)
            tl.store(bias_sums + at + BLOCK_M, p_sum)
    if dq is not None:
        dq_base = dq + b * dq_strides[0] + h * dq_strides[1] + row * dq_strides[2]
        store_tokens(dq_base, dq_strides[2], m, length, D, acc * scale)


@triton.jit(do_not_specialize=[*LENGTHS, *RANDOM, "longest_key", "key_heads"])
def _key_gradients(
    queries,  # streams, each [B, Hq, Lq, D], or packed as [rows, Hq, D]
    grad_outs,
    row_maxes,  # of each stream [B, Hq, Lq], or [Hq, rows]
    log_sums,
    deltas,
    key,  # [B, Hkv, Lk, D], or packed
    value,
    padding,  # [B] or None
    dk,  # or None
    dv,  # or None
    mask,
    stream_bias,  # [H, streams] of this segment, or None
    query_ends,
    key_ends,
    query_lengths,
    key_heads,
    longest_key,
    query_strides,  # of each stream, one after the other
    grad_strides,
    statistics_strides,  # batch, head of each stream
    key_strides,
    value_strides,
    dk_strides,
    dv_strides,
    mask_strides,
    bias_stride,
    window_left,
    window_right,
    seed_low,
    seed_high,
    offset,
    threshold,
    kept_scale,
    scale,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    blocks = tl.cdiv(longest_key, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    pair = tl.program_id(0) // blocks
    b, key_head = tl.cast(pair // key_heads, tl.int64), tl.cast(pair % key_heads, tl.int64)
    total_keys, key_base = longest_key, b * 0
    if key_ends is not None:
        key_base = tl.load(key_ends + b).to(tl.int64)
        total_keys = (tl.load(key_ends + b + 1) - key_base).to(tl.int32)
    key_length = total_keys
    if padding is not None:
        key_length = tl.minimum(tl.maximum(tl.load(padding + b), 0), key_length).to(tl.int32)
    n = first + tl.arange(0, BLOCK_N)
    k_base = key + b * key_strides[0] + key_head * key_strides[1] + key_base * key_strides[2]
    k = load_tokens(k_base, key_strides[2], n, key_length, D, BLOCK_D)
    v_base = value + b * value_strides[0] + key_head * value_strides[1] + key_base * value_strides[2]
    v = load_tokens(v_base, value_strides[2], n, key_length, DV, BLOCK_DV)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i in tl.static_range(len(queries)):
        length, row = number(query_lengths[i]), b * 0
        if query_ends is not None:
            row = tl.load(query_ends + b).to(tl.int64)
            length = (tl.load(query_ends + b + 1) - row).to(tl.int32)
        diagonal = 0
        if BOTTOM_RIGHT:
            diagonal = key_length - length
        begin, end = query_range(first, BLOCK_N, diagonal, length, window_left, window_right, BLOCK_M)
        if first >= key_length:
            end = begin
        for g in range(0, GROUP):
            h = key_head * GROUP + g
            slice = (b * key_heads * GROUP + h).to(tl.int32)
            q_base = queries[i] + b * query_strides[3 * i] + h * query_strides[3 * i + 1]
            q_base += row * query_strides[3 * i + 2]
            g_base = grad_outs[i] + b * grad_strides[3 * i] + h * grad_strides[3 * i + 1]
            g_base += row * grad_strides[3 * i + 2]
            statistics = b * number(statistics_strides[2 * i]) + h * number(statistics_strides[2 * i + 1]) + row
            mask_of_head = mask
            if mask is not None:
                mask_of_head = mask + b * mask_strides[0] + h * mask_strides[1]
            bias = stream_bias
            last = end
            if stream_bias is not None:
                bias = tl.load(stream_bias + h * bias_stride + i).to(tl.float32)
                if bias == -float("inf"):
                    last = begin
            for start in range(begin, last, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                q = load_tokens(q_base, query_strides[3 * i + 2], m, length, D, BLOCK_D)
                grad = load_tokens(g_base, grad_strides[3 * i + 2], m, length, DV, BLOCK_DV)
                row_max, log_sum, delta = load_statistics(
                    row_maxes[i] + statistics, log_sums[i] + statistics, deltas[i] + statistics, m, length
                )
                p, ds, derivative = score_gradients(
                    q, k, v, grad, row_max, log_sum, delta, m, n, length, key_length, diagonal, mask_of_head,
                    mask_strides[2], mask_strides[3], bias, slice, seed_low, seed_high, offset, threshold,
                    kept_scale, scale, softcap, window_left, window_right, MASKED, DROPOUT, PRECISION,
                )  # fmt: skip
                if MASKED:  # a query with nothing to attend to has gradient 0, whatever is in it
                    active = (row_max != -float("inf"))[:, None]
                    q = tl.where(active, q.to(tl.float32), 0.0).to(q.dtype)
                if dv is not None:
                    acc_v += tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision=PRECISION)
                if dk is not None:
                    acc_k += tl.dot(tl.trans((ds * derivative).to(q.dtype)), q, input_precision=PRECISION)
    if dk is not None:
        dk_base = dk + b * dk_strides[0] + key_head * dk_strides[1] + key_base * dk_strides[2]
        store_tokens(dk_base, dk_strides[2], n, total_keys, D, acc_k * scale)
    if dv is not None:
        dv_base = dv + b * dv_strides[0] + key_head * dv_strides[1] + key_base * dv_strides[2]
        store_tokens(dv_base, dv_strides[2], n, total_keys, DV, acc_v)


# --- launches ---------------------------------------------------------------------------------------------------------


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
        block = max(triton.next_power_of_2(dv), 16)
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


def config(x: Tensor, attention: Attention) -> Config:
    """Two sums as wide as a head and three tiles of scores fit in the registers of every target: smaller tiles for wide
    heads, for masks and dropout, whose indices and words take registers, and for float32's three products."""
    widest = max(attention.padded_dims()[name] for name in ("BLOCK_D", "BLOCK_DV"))
    heavy = attention.masked or attention.dropout_p > 0
    of = target(x)
    nvidia = of.backend == "cuda"
    if x.dtype == torch.float32:
        return Config({"BLOCK_M": 16, "BLOCK_N": 32 if widest <= 64 else 16}, 8, 1)
    if widest > 128:
        return Config({"BLOCK_M": 32, "BLOCK_N": 16}, 8 if heavy else 4, 1)
    if heavy or (widest > 64 and not nvidia):
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1)
    if widest > 64:
        return Config({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2)
    roomy = not nvidia or of.arch >= 90
    return Config({"BLOCK_M": 64, "BLOCK_N": 64 if roomy else 32}, 4, 2 if nvidia else 1)


def options(attention: Attention, query: Tensor, heads: int) -> dict[str, Any]:
    return {
        "GROUP": heads // max(attention.keys[0].shape[1], 1),
        "BOTTOM_RIGHT": attention.bottom_right,
        "MASKED": attention.masked,
        "DROPOUT": attention.dropout_p > 0,
        "PRECISION": dot_precision(query),
        **attention.padded_dims(),
    }


def query_gradient(
    stream: Queries, deltas: Tensor, attention: Attention, dq: Tensor | None, with_bias: bool
) -> Tensor | None:
    """Fill dq; returns the gradient of the stream's bias [H, segments] where it is wanted, summed over the batch.

    A query's dS over all keys adds up to the gradient of its LSE. What rounding of the output, and so of Δ, leaves of
    that is given back to the segments in proportion to their P: it would be all there is of a bias that cancels.
    """
    mask, bias, mask_strides, bias_stride = attention.masks()
    chosen = config(stream.query, attention)
    block = chosen.constants["BLOCK_M"]
    blocks, segments = ceil_div(stream.longest, block), len(attention.keys)
    programs = blocks * stream.batch * stream.heads
    sums = deltas.new_empty((stream.batch, stream.heads, blocks, segments, 2, block)) if with_bias else None
    launch(
        _query_gradient,
        (programs,),
        *(stream.query, stream.grad_out, dq, sums, stream.row_max, stream.log_sum, deltas),
        *(tuple(attention.keys), tuple(attention.values), tuple(attention.padding)),
        *(mask, bias, attention.query_ends, attention.key_ends),
        *(stream.longest, stream.heads, odd([k.shape[-2] for k in attention.keys])),
        *(token_strides(stream.query), token_strides(stream.grad_out)),
        *((0, 0, 0) if dq is None else token_strides(dq), odd(stream.statistics_strides)),
        *(segment_strides(attention.keys), segment_strides(attention.values), mask_strides, bias_stride),
        *attention.windows(),
        *attention.randomness(),
        *(attention.scale, attention.softcap or None),
        **options(attention, stream.query, stream.heads),
        config=chosen,
    )
    if sums is None:
        return None
    of_scores, of_weights = sums.unbind(4)  # [B, H, blocks, segments, BLOCK_M]
    surplus = of_scores.sum(3, keepdim=True)
    if stream.grad_log_sum is not None:
        padded = torch.nn.functional.pad(stream.grad_log_sum, (0, blocks * block - stream.longest))
        surplus = surplus - padded.unflatten(2, (blocks, 1, block))
    return (of_scores - of_weights * surplus).sum((0, 2, 4))


def key_gradients(
    streams: Sequence[Queries],
    deltas: Sequence[Tensor],
    attention: Attention,
    segment: int,
    longest_key: int,
    dk: Tensor | None,
    dv: Tensor | None,
    stream_bias: Tensor | None,
) -> None:
    """Fill dk and dv of a segment; ``stream_bias`` is [H or 1, streams] of it."""
    key, value = attention.keys[segment], attention.values[segment]
    mask, _, mask_strides, _ = attention.masks()
    chosen = config(key, attention)
    first = streams[0]
    launch(
        _key_gradients,
        (ceil_div(longest_key, chosen.constants["BLOCK_N"]) * first.batch * key.shape[1],),
        *(tuple(s.query for s in streams), tuple(s.grad_out for s in streams)),
        *(tuple(s.row_max for s in streams), tuple(s.log_sum for s in streams), tuple(deltas)),
        *(key, value, attention.padding[segment], dk, dv),
        *(mask, stream_bias, attention.query_ends, attention.key_ends),
        *(odd([s.longest for s in streams]), key.shape[1], longest_key),
        *(segment_strides([s.query for s in streams]), segment_strides([s.grad_out for s in streams])),
        *(odd([x for s in streams for x in s.statistics_strides]), token_strides(key), token_strides(value)),
        *((0, 0, 0) if x is None else token_strides(x) for x in (dk, dv)),
        *(mask_strides, 0 if stream_bias is None or stream_bias.shape[0] == 1 else stream_bias.stride(0)),
        *attention.windows(),
        *attention.randomness(),
        *(attention.scale, attention.softcap or None),
        **options(attention, first.query, first.heads),
        config=chosen,
    )
