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
def load_tokens(base, stride, token, length, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False):
    """[tokens, BLOCK_D] of a sequence, zero beyond its end, which WHOLE says no token is, and its D features."""
    d = tl.arange(0, BLOCK_D)
    at = base + token.to(tl.int64)[:, None] * stride + d[None, :]
    if D == BLOCK_D:
        x = tl.load(at) if WHOLE else tl.load(at, mask=(token < length)[:, None], other=0.0)
    else:
        x = tl.load(at, mask=(token < length)[:, None] & (d < D)[None, :], other=0.0)
    return x


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
def key_range(first, count, diagonal, length, mask, window_left, window_right, BLOCK: tl.constexpr):
    """The keys [begin, end) that queries [first, first + count) may attend to, in whole blocks from a block's start.

    Up to a block's start in between every query of them may attend to every key.
    """
    begin, end, whole = 0, length, length
    if window_left is not None:
        begin = tl.maximum(first + diagonal - window_left, 0) // BLOCK * BLOCK
    if window_right is not None:
        end = tl.minimum(tl.maximum(first + count + diagonal + window_right, 0), length)
        whole = tl.minimum(first + diagonal + window_right + 1, length)
    whole = tl.maximum(whole // BLOCK * BLOCK, begin)
    if (window_left is not None) or (mask is not None):
        whole = begin
    return begin, whole, end


@triton.jit
def query_range(first, count, diagonal, length, mask, window_left, window_right, BLOCK: tl.constexpr):
    """The queries [begin, end) that may attend to keys [first, first + count), in whole blocks from a block's start.

    From a block's start in between on every query may attend to every key of them.
    """
    begin, end, whole = 0, length, 0
    if window_right is not None:
        begin = tl.maximum(first - window_right - diagonal, 0) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(first + count - 1 - window_right - diagonal, 0), BLOCK) * BLOCK
    if window_left is not None:
        end = tl.minimum(tl.maximum(first + count + window_left - diagonal, 0), length)
    if (window_left is not None) or (mask is not None):
        whole = end
    return begin, tl.minimum(whole, tl.maximum(end, begin)), end


@triton.jit
def allowed_pairs(
    s,  # a tile of scores
    m,  # queries, in the shape of a column or a row of the tile
    n,  # keys, in the other
    query_length,
    key_length,
    diagonal,  # of query i: key i + diagonal
    mask,  # of this batch element and head, bool or float, or None
    mask_query_stride,
    mask_key_stride,
    window_left,  # or None
    window_right,
):
    """Which pairs may attend, and their scores with the mask added."""
    inside = (m < query_length) & (n < key_length)
    allowed = inside
    if window_left is not None:
        allowed = allowed & (n >= m + diagonal - window_left)
    if window_right is not None:
        allowed = allowed & (n <= m + diagonal + window_right)
    if mask is not None:
        at = mask + m.to(tl.int64) * mask_query_stride + n.to(tl.int64) * mask_key_stride
        if mask.dtype.element_ty.is_floating():
            added = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            s = s + added
            allowed = allowed & (added != -float("inf"))
        else:
            allowed = allowed & (tl.load(at, mask=inside, other=0) != 0)
    return s, allowed


@triton.jit
def capped(s, softcap, bias):
    """Scores after softcap and bias, and the derivative of the former."""
    derivative = 1.0
    if softcap is not None:
        t = tanh(s / softcap)
        s = t * softcap
        derivative = 1.0 - t * t
    if bias is not None:
        s = s + bias
    return s, derivative


@triton.jit
def online_softmax(s, unit, row_max, total):
    """Weights of a tile of scores s · unit, what to multiply earlier sums with, and the maximum and sum so far."""
    higher = tl.maximum(row_max, tl.max(s, 1) * unit)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2((s * unit - shift[:, None]) * LOG2_E)
    rescale = tl.exp2((row_max - shift) * LOG2_E)
    return p, rescale, higher, total * rescale + tl.sum(p, 1)


@triton.jit
def dropout_keep(seed_low, seed_high, offset, slice, m, n, threshold):
    """Which pairs survive: word n % 4 of Philox for (n // 4, m, slice, offset) is at least the threshold."""
    low = seed_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = seed_high.to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = (m + n) * 0
    w0, w1, w2, w3 = tl.philox(low | (high << 32), zero + n // 4, zero + m, zero + slice, zero + offset)
    word = n % 4
    chosen = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return chosen.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def score_gradients(
    s,  # Q Kᵀ of a tile, or its transpose
    dp,  # dO Vᵀ, likewise
    row_max,  # of the queries, in the shape of a column or a row of the tile, as load_statistics has them
    log_sum,
    delta,
    m,  # queries and keys, likewise
    n,
    query_length,
    key_length,
    diagonal,
    mask,
    mask_query_stride,
    mask_key_stride,
    bias,
    usable,  # whether a key and its value are finite, or None
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
    WHOLE: tl.constexpr,  # every query may attend to every key
    DROPOUT: tl.constexpr,
):
    """P after dropout, dS and d score / d (scale · q k) of a tile."""
    s, derivative = capped(s * scale, softcap, bias)
    if not WHOLE:
        s, allowed = allowed_pairs(
            s, m, n, query_length, key_length, diagonal, mask, mask_query_stride, mask_key_stride, window_left,
            window_right,
        )  # fmt: skip
    if usable is not None:
        s = tl.where(usable, s, float("nan"))
    p = tl.exp2((s - row_max - log_sum) * LOG2_E)
    if not WHOLE:
        p = tl.where(allowed, p, 0.0)
    survived = p
    if DROPOUT:
        kept = dropout_keep(seed_low, seed_high, offset, slice, m, n, threshold)
        survived = tl.where(kept, p * kept_scale, 0.0)
        dp = tl.where(kept, dp * kept_scale, 0.0)
    ds = p * (dp - delta)
    if not WHOLE:
        ds = tl.where(allowed, ds, 0.0)
    return survived, ds, derivative


@triton.jit
def load_statistics(row_maxes, log_sums, deltas, m, length):
    """Maximum, logarithm of the sum and Δ of queries; those with nothing to attend to get weights of zero."""
    inside = m < length
    row_max = tl.load(row_maxes + m, mask=inside, other=-float("inf"))
    log_sum = tl.load(log_sums + m, mask=inside, other=0.0)
    nothing = row_max == -float("inf")
    row_max, log_sum = tl.where(nothing, 0.0, row_max), tl.where(nothing, float("inf"), log_sum)
    return row_max, log_sum, tl.load(deltas + m, mask=inside, other=0.0)
