"""What the kernels of attention share: tiles of tokens, scores under masks and their gradients, dropout.

A tile of scores is [M, N]: M queries of one (batch element, head) by N keys of one segment. Scores are in natural
units; exponentials are taken as exp2((s − max) · log2 e), the difference first, so that large scores lose nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.math import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tokens(base, stride, token, length, features, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of a sequence, zero beyond its end and its features."""
    d = tl.arange(0, BLOCK_D)
    inside = (token < length)[:, None] & (d < features)[None, :]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def store_tokens(base, stride, token, length, features, x):
    d = tl.arange(0, x.shape[1])
    inside = (token < length)[:, None] & (d < features)[None, :]
    at = base + token.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def finite(x):
    """x with zeros for what is not finite."""
    wide = x.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(x.dtype)


@triton.jit
def has_finite_rows(x):
    """Whether each row of a tile is finite."""
    return tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), 1) > 0


@triton.jit
def key_range(first, count, diagonal, length, window_left, window_right, BLOCK: tl.constexpr):
    """The keys that queries [first, first + count) may attend to, in whole blocks from a block's start."""
    begin = 0
    end = length
    if window_left is not None:
        begin = tl.maximum(first + diagonal - window_left, 0) // BLOCK * BLOCK
    if window_right is not None:
        end = tl.minimum(tl.maximum(first + count + diagonal + window_right, 0), length)
    return begin, end


@triton.jit
def query_range(first, count, diagonal, length, window_left, window_right, BLOCK: tl.constexpr):
    """The queries that may attend to keys [first, first + count), in whole blocks from a block's start."""
    begin = 0
    end = length
    if window_right is not None:
        begin = tl.maximum(first - window_right - diagonal, 0) // BLOCK * BLOCK
    if window_left is not None:
        end = tl.minimum(tl.maximum(first + count + window_left - diagonal, 0), length)
    return begin, end


@triton.jit
def masked_scores(
    s,  # [M, N], scale · Q Kᵀ
    m,  # [M], queries
    n,  # [N], keys
    query_length,
    key_length,
    diagonal,  # of query i: key i + diagonal
    mask,  # of this batch element and head, bool or float, or None
    mask_query_stride,
    mask_key_stride,
    bias,  # a finite number, or None
    softcap,  # or None
    window_left,  # or None
    window_right,
):
    """Scores after softcap, mask and bias, which pairs may attend, and d score / d (scale · q k)."""
    derivative = 1.0
    if softcap is not None:
        t = tanh(s / softcap)
        s = t * softcap
        derivative = 1.0 - t * t
    allowed = (m < query_length)[:, None] & (n < key_length)[None, :]
    if window_left is not None:
        allowed = allowed & (n[None, :] >= m[:, None] + diagonal - window_left)
    if window_right is not None:
        allowed = allowed & (n[None, :] <= m[:, None] + diagonal + window_right)
    if mask is not None:
        at = m.to(tl.int64)[:, None] * mask_query_stride + n.to(tl.int64)[None, :] * mask_key_stride
        inside = (m < query_length)[:, None] & (n < key_length)[None, :]
        if mask.dtype.element_ty.is_floating():
            added = tl.load(mask + at, mask=inside, other=0.0).to(tl.float32)
            s = s + added
            allowed = allowed & (added != -float("inf"))
        else:
            allowed = allowed & (tl.load(mask + at, mask=inside, other=0) != 0)
    if bias is not None:
        s = s + bias
    return s, allowed, derivative


@triton.jit
def dropout_keep(seed_low, seed_high, offset, slice, m, n, threshold):
    """Which pairs survive: word n % 4 of Philox for (n // 4, m, slice, offset) is at least the threshold."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = (m[:, None] + n[None, :]) * 0
    c0, c1 = zero + (n // 4)[None, :], zero + m[:, None]
    c2, c3 = zero + slice, zero + offset
    w0, w1, w2, w3 = tl.philox(low | (high << 32), c0, c1, c2, c3)
    word = (n % 4)[None, :]
    chosen = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return chosen.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def score_gradients(
    q,  # [M, BLOCK_D]
    k,  # [N, BLOCK_D]
    v,  # [N, BLOCK_DV]
    grad_out,  # [M, BLOCK_DV]
    row_max,  # [M]
    log_sum,
    delta,
    m,
    n,
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
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P after dropout, dS and d score / d (scale · q k) of a tile, [M, N] each."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    s, allowed, derivative = masked_scores(
        s, m, n, query_length, key_length, diagonal, mask, mask_query_stride, mask_key_stride, bias, softcap,
        window_left, window_right,
    )  # fmt: skip
    if MASKED:
        usable = has_finite_rows(k) & has_finite_rows(v)
        s = tl.where(usable[None, :], s, float("nan"))
    allowed = allowed & (row_max != -float("inf"))[:, None]
    shift = tl.where(row_max == -float("inf"), 0.0, row_max)
    p = tl.exp2((s - shift[:, None] - log_sum[:, None]) * LOG2_E)
    p = tl.where(allowed, p, 0.0)
    dp = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
    survived = p
    if DROPOUT:
        kept = dropout_keep(seed_low, seed_high, offset, slice, m, n, threshold)
        survived = tl.where(kept, p * kept_scale, 0.0)
        dp = tl.where(kept, dp * kept_scale, 0.0)
    ds = tl.where(allowed, p * (dp - delta[:, None]), 0.0)
    return survived, ds, derivative


@triton.jit
def load_statistics(row_maxes, log_sums, deltas, m, length):
    inside = m < length
    row_max = tl.load(row_maxes + m, mask=inside, other=-float("inf"))
    log_sum = tl.load(log_sums + m, mask=inside, other=0.0)
    log_sum = tl.where(log_sum == -float("inf"), 0.0, log_sum)
    return row_max, log_sum, tl.load(deltas + m, mask=inside, other=0.0)
