"""dK and dV of attention, of one segment of keys under one or several streams of queries.

    dK = scale · dSᵀ Q,   dV = dropout(P)ᵀ dO

Tiling     a program owns BLOCK_N keys of one (batch element, key head) and walks over the queries of every stream and
           every head of its group.
Precision  as in attention_backward.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import (
    has_finite_rows,
    load_statistics,
    load_tokens,
    query_range,
    score_gradients,
    store_tokens,
)
from mmkernels.triton.attention_backward import Queries, options
from mmkernels.triton.attention_forward import LENGTHS, RANDOM
from mmkernels.triton.attention_inputs import Attention, segment_strides, token_strides
from mmkernels.triton.launch import Config, ceil_div, launch, odd, target
from mmkernels.triton.math import number


@triton.jit
def _along_queries(
    q_base,  # of one (batch element, head) and stream
    g_base,
    q_stride,
    g_stride,
    row_maxes,
    log_sums,
    deltas,
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    n,
    begin,
    end,
    query_length,
    key_length,
    diagonal,
    mask,
    mask_query_stride,
    mask_key_stride,
    bias,
    slice,
    seed_low,
    seed_high,
    offset,
    threshold,
    kept_scale,
    scale,
    softcap,
    window_left,
    window_right,
    dk,  # None where it is not wanted
    dv,
    acc_k,  # [N, BLOCK_D]
    acc_v,  # [N, BLOCK_DV]
    D: tl.constexpr,
    DV: tl.constexpr,
    WHOLE: tl.constexpr,  # every query may attend to every key
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """acc_k and acc_v after the queries [begin, end) of a stream.

    Tiles of scores are [N, M] here: so they are what the products that follow have on their left, from registers.
    """
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = load_tokens(q_base, q_stride, m, query_length, D, BLOCK_D)
        g = load_tokens(g_base, g_stride, m, query_length, DV, BLOCK_DV)
        row_max, log_sum, delta = load_statistics(row_maxes, log_sums, deltas, m, query_length)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        usable = None
        if MASKED and not WHOLE:
            usable = (has_finite_rows(k) & has_finite_rows(v))[:, None]
        p, ds, derivative = score_gradients(
            s, dp, row_max[None, :], log_sum[None, :], delta[None, :], m[None, :], n[:, None], query_length,
            key_length, diagonal, mask, mask_query_stride, mask_key_stride, bias, usable, slice, seed_low, seed_high,
            offset, threshold, kept_scale, scale, softcap, window_left, window_right, WHOLE, DROPOUT,
        )  # fmt: skip
        if MASKED and not WHOLE:  # a query with nothing to attend to has gradient 0, whatever is in it
            q = tl.where((log_sum != float("inf"))[:, None], q.to(tl.float32), 0.0).to(q.dtype)
        if dv is not None:
            acc_v += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        if dk is not None:
            acc_k += tl.dot((ds * derivative).to(q.dtype), q, input_precision=PRECISION)
    return acc_k, acc_v


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
        begin, whole, end = query_range(first, BLOCK_N, diagonal, length, mask, window_left, window_right, BLOCK_M)
        if first >= key_length:
            whole, end = begin, begin
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
            masked_end, last = whole, end
            if stream_bias is not None:
                bias = tl.load(stream_bias + h * bias_stride + i).to(tl.float32)
                if bias == -float("inf"):
                    masked_end, last = begin, whole
            if (window_left is not None) or (window_right is not None) or (mask is not None):
                acc_k, acc_v = _along_queries(
                    q_base, g_base, query_strides[3 * i + 2], grad_strides[3 * i + 2], row_maxes[i] + statistics,
                    log_sums[i] + statistics, deltas[i] + statistics, k, v, n, begin, masked_end, length, key_length,
                    diagonal, mask_of_head, mask_strides[2], mask_strides[3], bias, slice, seed_low, seed_high, offset,
                    threshold, kept_scale, scale, softcap, window_left, window_right, dk, dv, acc_k, acc_v,
                    D, DV, False, MASKED, DROPOUT, PRECISION, BLOCK_M, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
            if (mask is None) and (window_left is None):
                acc_k, acc_v = _along_queries(
                    q_base, g_base, query_strides[3 * i + 2], grad_strides[3 * i + 2], row_maxes[i] + statistics,
                    log_sums[i] + statistics, deltas[i] + statistics, k, v, n, whole, last, length, key_length,
                    diagonal, mask_of_head, mask_strides[2], mask_strides[3], bias, slice, seed_low, seed_high, offset,
                    threshold, kept_scale, scale, softcap, window_left, window_right, dk, dv, acc_k, acc_v,
                    D, DV, True, MASKED, DROPOUT, PRECISION, BLOCK_M, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
    here = (n < key_length)[:, None]
    if dk is not None:
        dk_base = dk + b * dk_strides[0] + key_head * dk_strides[1] + key_base * dk_strides[2]
        store_tokens(dk_base, dk_strides[2], n, total_keys, D, tl.where(here, acc_k * scale, 0.0))
    if dv is not None:
        dv_base = dv + b * dv_strides[0] + key_head * dv_strides[1] + key_base * dv_strides[2]
        store_tokens(dv_base, dv_strides[2], n, total_keys, DV, tl.where(here, acc_v, 0.0))


def config(x: Tensor, attention: Attention) -> Config:
    """Two sums as wide as a head and two tiles of scores fit in the registers of every target. On Hopper what spills is
    5 to 9 % faster: 32 x 128 of 64 features, 64 x 128 of 128."""
    single, nvidia, widest = x.dtype == torch.float32, target(x).backend == "cuda", attention.widest
    if single:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16}, 8, 1)
    if not nvidia:
        return Config({"BLOCK_M": 32, "BLOCK_N": 32 if widest <= 128 else 16}, 8, 1)
    arch = target(x).arch
    if widest > 128:
        return Config({"BLOCK_M": 32, "BLOCK_N": 16 if attention.heavy else 32}, 8, 1)
    if attention.heavy:
        return Config({"BLOCK_M": 32, "BLOCK_N": 64 if arch >= 90 and widest <= 64 else 32}, 8, 1)
    if widest > 64:
        if arch == 90:
            return Config({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2)
        return Config({"BLOCK_M": 32, "BLOCK_N": 128 if arch > 90 else 64}, 8, 1)
    return Config({"BLOCK_M": 64 if arch >= 90 else 32, "BLOCK_N": 64}, 4, 1 if arch == 90 else 2)


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
