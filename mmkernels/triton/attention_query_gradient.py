"""dQ of attention, and the gradient of a bias that a whole segment of keys has.

    dQ = scale · dS K,   dbias = sums of dS

Tiling     a program owns BLOCK_M queries of one (batch element, head) and walks over the keys of every segment.
Precision  as in attention_backward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import (
    finite,
    has_finite_rows,
    key_range,
    load_statistics,
    load_tokens,
    score_gradients,
    store_tokens,
)
from mmkernels.triton.attention_backward import Queries, options
from mmkernels.triton.attention_forward import LENGTHS, RANDOM
from mmkernels.triton.attention_inputs import Attention, segment_strides, token_strides
from mmkernels.triton.launch import Config, ceil_div, launch, odd, target
from mmkernels.triton.math import number


@triton.jit
def _along_keys(
    q,  # [M, BLOCK_D]
    g,  # [M, BLOCK_DV]
    k_base,  # of one (batch element, head) and segment
    v_base,
    k_stride,
    v_stride,
    row_max,  # [M]
    log_sum,
    delta,
    m,
    begin,
    end,
    query_length,
    key_length,
    diagonal,
    mask,
    mask_query_stride,
    mask_key_stride,
    bias,
    bias_sums,  # None where the sums are not wanted
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
    acc,  # [M, BLOCK_D]
    ds_sum,  # [M]
    p_sum,
    D: tl.constexpr,
    DV: tl.constexpr,
    WHOLE: tl.constexpr,  # every query may attend to every key
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """acc, ds_sum and p_sum after the keys [begin, end) of a segment."""
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_tokens(k_base, k_stride, n, key_length, D, BLOCK_D, WHOLE)
        v = load_tokens(v_base, v_stride, n, key_length, DV, BLOCK_DV, WHOLE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        usable = None
        if MASKED and not WHOLE:
            usable = (has_finite_rows(k) & has_finite_rows(v))[None, :]
            k = finite(k)
        p, ds, derivative = score_gradients(
            s, dp, row_max[:, None], log_sum[:, None], delta[:, None], m[:, None], n[None, :], query_length,
            key_length, diagonal, mask, mask_query_stride, mask_key_stride, bias, usable, slice, seed_low, seed_high,
            offset, threshold, kept_scale, scale, softcap, window_left, window_right, WHOLE, DROPOUT,
        )  # fmt: skip
        if bias_sums is not None:
            ds_sum += tl.sum(ds, 1)
            p_sum += tl.sum(p, 1)
        acc += tl.dot((ds * derivative).to(k.dtype), k, input_precision=PRECISION)
    return acc, ds_sum, p_sum


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
        begin, whole, end = key_range(first, BLOCK_M, diagonal, key_length, mask, window_left, window_right, BLOCK_N)
        if first >= length:
            whole, end = begin, begin
        bias = stream_bias
        if stream_bias is not None:
            bias = tl.load(stream_bias + h * bias_stride + j).to(tl.float32)
            if bias == -float("inf"):
                whole, end = begin, begin
        k_base = keys[j] + b * key_strides[3 * j] + h // GROUP * key_strides[3 * j + 1]
        k_base += key_base * key_strides[3 * j + 2]
        v_base = values[j] + b * value_strides[3 * j] + h // GROUP * value_strides[3 * j + 1]
        v_base += key_base * value_strides[3 * j + 2]
        ds_sum, p_sum = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        if (mask is None) and (window_left is None):
            acc, ds_sum, p_sum = _along_keys(
                q, g, k_base, v_base, key_strides[3 * j + 2], value_strides[3 * j + 2], row_max, log_sum, delta, m,
                begin, whole, length, key_length, diagonal, mask, mask_strides[2], mask_strides[3], bias, bias_sums,
                slice, seed_low, seed_high, offset, threshold, kept_scale, scale, softcap, window_left, window_right,
                acc, ds_sum, p_sum, D, DV, True, MASKED, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        acc, ds_sum, p_sum = _along_keys(
            q, g, k_base, v_base, key_strides[3 * j + 2], value_strides[3 * j + 2], row_max, log_sum, delta, m,
            whole, end, length, key_length, diagonal, mask, mask_strides[2], mask_strides[3], bias, bias_sums,
            slice, seed_low, seed_high, offset, threshold, kept_scale, scale, softcap, window_left, window_right,
            acc, ds_sum, p_sum, D, DV, False, MASKED, DROPOUT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        if bias_sums is not None:
            at = (tl.program_id(0).to(tl.int64) * len(keys) + j) * 2 * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(bias_sums + at, ds_sum)
            tl.store(bias_sums + at + BLOCK_M, p_sum)
    if dq is not None:
        dq_base = dq + b * dq_strides[0] + h * dq_strides[1] + row * dq_strides[2]
        store_tokens(dq_base, dq_strides[2], m, length, D, acc * scale)


def config(x: Tensor, attention: Attention) -> Config:
    """A sum as wide as a head and two tiles of scores fit in the registers of every target."""
    single, nvidia, widest = x.dtype == torch.float32, target(x).backend == "cuda", attention.widest
    if single:
        return Config({"BLOCK_M": 16, "BLOCK_N": 32 if widest <= 64 else 16}, 8, 1)
    if not nvidia:
        return Config({"BLOCK_M": 32 if widest > 64 else 64, "BLOCK_N": 16 if widest > 128 else 32}, 8, 1)
    if widest > 128:
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1)
    if attention.heavy:
        return Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 1)
    if widest > 64:
        return Config({"BLOCK_M": 64, "BLOCK_N": 64 if target(x).arch >= 90 else 32}, 4, 2)
    return Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3)


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
