"""The forward of attention: one stream of queries over the keys of one or several segments.

    S = scale · Q Kᵀ,  S ← softcap · tanh(S / softcap),  S ← S + mask,  P = softmax(S),  O = dropout(P) · V

Tiling     a program owns BLOCK_M queries of one (batch element, head) and walks over blocks of keys, of one segment
           after the other; scores, maximum, sum and output stay in registers (online softmax). Blocks of keys that no
           query of the program may attend to are not read. With few queries the keys are shared among programs in a
           fixed partition, whose parts a second kernel merges in their order.
Precision  products in the inputs' dtype with float32 sums; P rounded to the inputs' dtype for the product with V.
Limits     head dims up to 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import (
    LOG2_E,
    allowed_pairs,
    capped,
    dropout_keep,
    finite,
    has_finite_rows,
    key_range,
    load_tokens,
    online_softmax,
    store_tokens,
)
from mmkernels.triton.attention_forward_tma import attend_by_descriptors, pays
from mmkernels.triton.attention_inputs import Attention, segment_strides, token_strides
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, odd, target
from mmkernels.triton.math import number

LENGTHS = ["query_length", "heads", "share", "window_left", "window_right"]
RANDOM = ["seed_low", "seed_high", "offset", "threshold"]


@triton.jit
def _attend(
    q,  # [M, BLOCK_D]
    k_base,  # of one (batch element, head) and segment
    v_base,
    k_stride,
    v_stride,
    m,  # [M], the queries' indices
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
    row_max,  # [M]
    total,  # [M], the sum of exponentials
    acc,  # [M, BLOCK_DV]
    D: tl.constexpr,
    DV: tl.constexpr,
    RISING: tl.constexpr,
    WHOLE: tl.constexpr,  # every query may attend to every key
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """row_max, total and acc after the keys [begin, end) of a segment."""
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = load_tokens(k_base, k_stride, n, key_length, D, BLOCK_D, WHOLE)
        v = load_tokens(v_base, v_stride, n, key_length, DV, BLOCK_DV, WHOLE)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        unit = scale  # what is left to multiply scores with
        if (softcap is not None) or (bias is not None) or (mask is not None) or (not RISING):
            s, _ = capped(s * scale, softcap, bias)
            unit = 1.0
        if not WHOLE:
            s, allowed = allowed_pairs(
                s, m[:, None], n[None, :], query_length, key_length, diagonal, mask, mask_query_stride, mask_key_stride,
                window_left, window_right,
            )  # fmt: skip
            if MASKED:  # a value that is not finite reaches the queries that may attend to it and no others
                usable = has_finite_rows(k) & has_finite_rows(v)
                s = tl.where(usable[None, :], s, float("nan"))
                v = finite(v)
            s = tl.where(allowed, s, -float("inf"))
        p, rescale, row_max, total = online_softmax(s, unit, row_max, total)
        if DROPOUT:
            kept = dropout_keep(seed_low, seed_high, offset, slice, m[:, None], n[None, :], threshold)
            p = tl.where(kept, p * kept_scale, 0.0)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return row_max, total, acc


@triton.jit(do_not_specialize=LENGTHS + RANDOM)
def _forward(
    query,  # [B, Hq, Lq, D], or packed as [rows, Hq, D]
    out,  # [B, Hq, Lq, Dv]; with SHARED partial sums [shares, B·Hq·Lq, BLOCK_DV] float32
    row_maxes,  # [B, Hq, Lq] or [Hq, rows], float32, or None; with SHARED [shares, B·Hq·Lq]
    log_sums,
    keys,  # segments, each [B, Hkv, Lk, D]
    values,
    padding,  # of each segment [B] int, or None
    mask,  # [1|B, 1|Hq, 1|Lq, 1|Lk] or None
    stream_bias,  # [H, segments] or None
    query_ends,  # [B + 1], where packed members begin, or None
    key_ends,
    query_length,
    heads,
    key_lengths,  # of each segment, odd
    share,  # keys of a program
    query_strides,  # batch, head, token
    out_strides,
    statistics_strides,  # batch, head, odd
    key_strides,  # of each segment, one after the other
    value_strides,
    mask_strides,  # batch, head, query, key
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
    GROUP: tl.constexpr,  # query heads to a key head
    D: tl.constexpr,
    DV: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    RISING: tl.constexpr,  # whether scale is positive
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED: tl.constexpr,
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
    query += b * query_strides[0] + h * query_strides[1]
    key_base = b * 0
    if query_ends is not None:
        row = tl.load(query_ends + b).to(tl.int64)
        length = (tl.load(query_ends + b + 1) - row).to(tl.int32)
        query += row * query_strides[2]
        key_base = tl.load(key_ends + b).to(tl.int64)
    m = first + tl.arange(0, BLOCK_M)
    q = load_tokens(query, query_strides[2], m, length, D, BLOCK_D)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
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
        if SHARED:
            begin = tl.maximum(begin, tl.program_id(1) * share)
            end = tl.minimum(end, (tl.program_id(1) + 1) * share)
            whole = tl.minimum(tl.maximum(whole, begin), tl.maximum(end // BLOCK_N * BLOCK_N, begin))
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
        if (mask is None) and (window_left is None):
            row_max, total, acc = _attend(
                q, k_base, v_base, key_strides[3 * j + 2], value_strides[3 * j + 2], m, begin, whole, length,
                key_length, diagonal, mask, mask_strides[2], mask_strides[3], bias, slice, seed_low, seed_high, offset,
                threshold, kept_scale, scale, softcap, window_left, window_right, row_max, total, acc,
                D, DV, RISING, True, MASKED, DROPOUT, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
        row_max, total, acc = _attend(
            q, k_base, v_base, key_strides[3 * j + 2], value_strides[3 * j + 2], m, whole, end, length, key_length,
            diagonal, mask, mask_strides[2], mask_strides[3], bias, slice, seed_low, seed_high, offset, threshold,
            kept_scale, scale, softcap, window_left, window_right, row_max, total, acc,
            D, DV, RISING, False, MASKED, DROPOUT, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    if SHARED:
        at = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks * query_length) + slice * query_length
        store_tokens(out + at * BLOCK_DV, BLOCK_DV, m, length, BLOCK_DV, acc)
        tl.store(row_maxes + at + m, row_max, mask=m < length)
        tl.store(log_sums + at + m, total, mask=m < length)
    else:
        out += b * out_strides[0] + h * out_strides[1]
        statistics = b * number(statistics_strides[0]) + h * number(statistics_strides[1])
        if query_ends is not None:
            out += row * out_strides[2]
            statistics += row
        empty = total == 0.0
        acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
        store_tokens(out, out_strides[2], m, length, DV, acc)
        if row_maxes is not None:
            tl.store(row_maxes + statistics + m, row_max, mask=m < length)
            log_sum = tl.where(empty, -float("inf"), tl.log(tl.where(empty, 1.0, total)))
            tl.store(log_sums + statistics + m, log_sum, mask=m < length)


@triton.jit(do_not_specialize=["rows", "heads", "tokens", "first", "length", "shares"])
def _merge(
    partial,  # [shares, B·H·tokens, BLOCK_DV]
    partial_max,  # [shares, B·H·tokens]
    partial_sum,
    out,  # [B, H, L, Dv]
    row_maxes,  # [B·H·L] or None
    log_sums,
    rows,
    heads,
    tokens,
    first,  # where the tokens begin among L
    length,  # L
    shares,
    out_strides,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_DV)
    inside = r < rows
    row_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for i in range(0, shares):
        at = tl.cast(i, tl.int64) * rows + r
        of_share = tl.load(partial_max + at, mask=inside, other=-float("inf"))
        higher = tl.maximum(row_max, of_share)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        rescale, weight = tl.exp2((row_max - shift) * LOG2_E), tl.exp2((of_share - shift) * LOG2_E)
        row_max = higher
        total = total * rescale + weight * tl.load(partial_sum + at, mask=inside, other=0.0)
        x = tl.load(partial + at[:, None] * BLOCK_DV + d[None, :], mask=inside[:, None], other=0.0)
        acc = acc * rescale[:, None] + weight[:, None] * x
    empty = total == 0.0
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    slice = r // tokens
    b, h, m = (slice // heads).to(tl.int64), (slice % heads).to(tl.int64), (first + r % tokens).to(tl.int64)
    at = b * out_strides[0] + h * out_strides[1] + m * out_strides[2]
    tl.store(out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < DV)[None, :])
    if row_maxes is not None:
        at = slice.to(tl.int64) * length + m
        tl.store(row_maxes + at, row_max, mask=inside)
        log_sum = tl.where(empty, -float("inf"), tl.log(tl.where(empty, 1.0, total)))
        tl.store(log_sums + at, log_sum, mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------

FEW_QUERIES = 16  # with no more, keys are shared among programs
_SHARES = 64  # at most
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


def config(x: Tensor, attention: Attention, queries: int) -> Config:
    """Tiles by head dim and dtype: the scores' and the output's sums fit in the registers of every target, and the
    stages of K and V in its shared memory. On Hopper 64 queries of 4 warps, as many as a product of one warp group has,
    are as fast as 128 of 8 and leave more programs; 64 of 8 take twice as long."""
    single, nvidia, widest = x.dtype == torch.float32, target(x).backend == "cuda", attention.widest
    if queries <= FEW_QUERIES:
        return Config({"BLOCK_M": 16, "BLOCK_N": 32 if single or widest > 128 else 64}, 4, 2)
    if single:
        return Config({"BLOCK_M": 32 if widest <= 64 else 16, "BLOCK_N": 32}, 8, 2 if nvidia else 1)
    if not nvidia:
        return Config({"BLOCK_M": 64 if widest > 128 else 128, "BLOCK_N": 32 if widest > 128 else 64}, 8, 1)
    ampere = target(x).arch < 90
    if widest > 128:
        return Config({"BLOCK_M": 64 if ampere else 128, "BLOCK_N": 32}, 8, 2)
    if attention.heavy:
        return Config({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2)
    return Config({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2) if ampere else Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3)


def _shares_keys(query: Tensor, attention: Attention, tensors: Sequence[Tensor]) -> bool:
    """Whether the few queries of the heads that share a key head can stand as those of one head, so that a key is read
    once for all of them: nothing tells them apart, and in each of the tensors [B, Hq, Lq, …] they lie at one distance.
    """
    if query.dim() == 3 or attention.window != (-1, -1) or attention.dropout_p > 0 or attention.stream_bias is not None:
        return False
    group, length = query.shape[1] // max(attention.keys[0].shape[1], 1), query.shape[2]
    mask = attention.mask
    if not 1 < group * length <= FEW_QUERIES or group == 1 or (mask is not None and mask.shape[1:3] != (1, 1)):
        return False
    return length == 1 or all(x.stride(1) == length * x.stride(2) for x in tensors)


def attend(
    query: Tensor,
    attention: Attention,
    out: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    batch: int,
    query_length: int,
) -> None:
    """Fill ``out`` and, where they are wanted, row_max and log_sum.

    Args:
        query: [B, Hq, Lq, D], or packed [rows, Hq, D].
        attention: what it attends to.
        out: as query, with Dv features.
        statistics: row_max and log_sum, [B, Hq, Lq], or [Hq, rows] of packed queries.
        batch: B.
        query_length: Lq, or the longest member's.
    """
    if _shares_keys(query, attention, [query, out, *(statistics or ())]):
        key_heads = attention.keys[0].shape[1]
        shape = (batch, key_heads, query.shape[1] // key_heads * query_length)
        query, out = (x.view(*shape, x.shape[3]) for x in (query, out))
        statistics = statistics and (statistics[0].view(shape), statistics[1].view(shape))
        query_length = shape[2]
    if pays(query, attention):
        attend_by_descriptors(query, attention, out, statistics)
        return
    heads = query.shape[1]
    slices = batch * heads
    chosen = config(query, attention, query_length)
    dims, (mask, bias, mask_strides, bias_stride) = attention.padded_dims(), attention.masks()
    blocks = ceil_div(query_length, chosen.constants["BLOCK_M"])
    longest = max((k.shape[2] for k in attention.keys), default=0) if query.dim() == 4 else 0
    shares = 1
    if query_length <= FEW_QUERIES and len(attention.keys) == 1 and query.dim() == 4 and slices:
        shares = min(_SHARES, ceil_div(_PROGRAMS, slices), max(ceil_div(longest, 4 * chosen.constants["BLOCK_N"]), 1))
    share = ceil_div(ceil_div(longest, shares), chosen.constants["BLOCK_N"]) * chosen.constants["BLOCK_N"]
    rows = slices * query_length
    target_out, target_statistics = out, list(statistics or (None, None))
    if shares > 1:
        partials = partial_sums(query, shares, rows, dims["BLOCK_DV"])
        target_out, *target_statistics = partials
    of_rows = statistics[0] if statistics else None
    stats_strides = (
        (0, 0) if of_rows is None else of_rows.stride()[:2] if of_rows.dim() == 3 else (0, of_rows.stride(0))
    )
    launch(
        _forward,
        (blocks * slices, shares),
        *(query, target_out, *target_statistics),
        *(tuple(attention.keys), tuple(attention.values), tuple(attention.padding)),
        *(mask, bias, attention.query_ends, attention.key_ends),
        *(query_length, heads, odd([k.shape[-2] for k in attention.keys]), share),
        *(token_strides(query), token_strides(out), odd(stats_strides)),
        *(segment_strides(attention.keys), segment_strides(attention.values), mask_strides, bias_stride),
        *attention.windows(),
        *attention.randomness(),
        *(attention.scale, attention.softcap or None),
        GROUP=heads // max(attention.keys[0].shape[1], 1),
        BOTTOM_RIGHT=attention.bottom_right,
        RISING=attention.scale > 0,
        MASKED=attention.masked,
        DROPOUT=attention.dropout_p > 0,
        SHARED=shares > 1,
        PRECISION=dot_precision(query),
        **dims,
        config=chosen,
    )
    if shares > 1:
        merge_shares(partials, out, statistics)


def partial_sums(like: Tensor, shares: int, rows: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the sums, maxima and sums of weights that each share has of each row."""
    flat = like.new_empty(shares * rows * (features + 2), dtype=torch.float32)
    sums, maxima, weights = flat.split([shares * rows * features, shares * rows, shares * rows])
    return sums.view(shares, rows, features), maxima, weights


def merge_shares(partials: Sequence[Tensor], out: Tensor, statistics: Sequence[Tensor] | None, first: int = 0) -> None:
    """Fill ``out`` [B, H, L, Dv], and maxima and logarithms of sums [B, H, L], of as many tokens from ``first`` on as
    there are partial sums of."""
    (shares, rows, block), (batch, heads, length, dv) = partials[0].shape, out.shape
    launch(
        _merge,
        (ceil_div(rows, 16),),
        *(*partials, out, *(statistics or (None, None))),
        *(rows, heads, rows // max(batch * heads, 1), first, length, shares, token_strides(out)),
        DV=dv,
        BLOCK_DV=block,
        config=Config({"BLOCK_R": 16}),
    )
