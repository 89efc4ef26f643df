"""The gradient of attention's float mask, in the mask's own shape.

    dmask = dS, summed over every dim over which the mask is broadcast

Tiling     a program owns a tile of the mask of one of its batch elements and heads, and walks over those that share it.
           Where the mask has one query or one key, a tile is summed over these, and torch adds the tiles up in order.
Precision  sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.attention import has_finite_rows, load_statistics, load_tokens, score_gradients
from mmkernels.triton.attention_backward import Queries, options
from mmkernels.triton.attention_forward import LENGTHS, RANDOM
from mmkernels.triton.attention_inputs import Attention, token_strides
from mmkernels.triton.launch import Config, ceil_div, launch, odd
from mmkernels.triton.math import number


@triton.jit(do_not_specialize=[*LENGTHS, *RANDOM, "key_length", "batch", "mask_batch"])
def _mask_gradient(
    query,  # [B, Hq, Lq, D]
    grad_out,
    row_maxes,  # [B, Hq, Lq]
    log_sums,
    deltas,
    key,  # [B, Hkv, Lk, D]
    value,
    padding,  # [B] or None
    mask,
    partial,  # [mask batch, mask heads, query blocks or Lq, key blocks or Lk] float32
    query_length,
    key_length,
    batch,
    heads,
    mask_batch,
    mask_heads,
    query_strides,
    grad_strides,
    statistics_strides,
    key_strides,
    value_strides,
    mask_strides,
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
    ONE_QUERY: tl.constexpr,
    ONE_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    query_blocks, key_blocks = tl.cdiv(query_length, BLOCK_M), tl.cdiv(key_length, BLOCK_N)
    tile = tl.program_id(0) % (query_blocks * key_blocks)
    owner = tl.program_id(0) // (query_blocks * key_blocks)
    mask_b, mask_h = owner // mask_heads, owner % mask_heads
    m = tile // key_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    shared_batch, shared_heads = batch // mask_batch, heads // mask_heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, shared_batch * shared_heads):
        b = tl.cast(mask_b + i // shared_heads, tl.int64)
        h = tl.cast(mask_h + i % shared_heads, tl.int64)
        length = key_length
        if padding is not None:
            length = tl.minimum(tl.maximum(tl.load(padding + b), 0), key_length).to(tl.int32)
        diagonal = 0
        if BOTTOM_RIGHT:
            diagonal = length - query_length
        q_base = query + b * query_strides[0] + h * query_strides[1]
        q = load_tokens(q_base, query_strides[2], m, query_length, D, BLOCK_D)
        g_base = grad_out + b * grad_strides[0] + h * grad_strides[1]
        g = load_tokens(g_base, grad_strides[2], m, query_length, DV, BLOCK_DV)
        k_base = key + b * key_strides[0] + h // GROUP * key_strides[1]
        k = load_tokens(k_base, key_strides[2], n, length, D, BLOCK_D)
        v_base = value + b * value_strides[0] + h // GROUP * value_strides[1]
        v = load_tokens(v_base, value_strides[2], n, length, DV, BLOCK_DV)
        statistics = b * number(statistics_strides[0]) + h * number(statistics_strides[1])
        row_max, log_sum, delta = load_statistics(
            row_maxes + statistics, log_sums + statistics, deltas + statistics, m, query_length
        )
        slice = (b * heads + h).to(tl.int32)
        usable = None
        if MASKED:
            usable = (has_finite_rows(k) & has_finite_rows(v))[None, :]
        _, ds, _ = score_gradients(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), tl.dot(g, tl.trans(v), input_precision=PRECISION),
            row_max[:, None], log_sum[:, None], delta[:, None], m[:, None], n[None, :], query_length, length, diagonal,
            mask + b * mask_strides[0] + h * mask_strides[1], mask_strides[2], mask_strides[3], None, usable, slice,
            seed_low, seed_high, offset, threshold, kept_scale, scale, softcap, window_left, window_right,
            False, DROPOUT,
        )  # fmt: skip
        acc += ds
    rows, columns = query_length, key_length
    if ONE_QUERY:
        rows = query_blocks
    if ONE_KEY:
        columns = key_blocks
    base = partial + owner.to(tl.int64) * rows * columns
    if ONE_QUERY and ONE_KEY:
        tl.store(base + tile, tl.sum(tl.sum(acc, 1), 0))
    elif ONE_QUERY:
        tl.store(base + (tile // key_blocks).to(tl.int64) * columns + n, tl.sum(acc, 0), mask=n < key_length)
    elif ONE_KEY:
        tl.store(base + m.to(tl.int64) * columns + tile % key_blocks, tl.sum(acc, 1), mask=m < query_length)
    else:
        inside = (m < query_length)[:, None] & (n < key_length)[None, :]
        tl.store(base + m.to(tl.int64)[:, None] * columns + n[None, :], acc, mask=inside)


def config(x: Tensor, attention: Attention) -> Config:
    """Three tiles of scores fit in the registers of every target."""
    if x.dtype == torch.float32:
        return Config({"BLOCK_M": 16, "BLOCK_N": 16}, 8, 1)
    return Config({"BLOCK_M": 32, "BLOCK_N": 32 if attention.widest <= 128 else 16}, 8, 1)


def mask_gradient(stream: Queries, deltas: Tensor, attention: Attention) -> Tensor:
    """dmask, contiguous, of one segment of keys."""
    mask, key, value = attention.mask, attention.keys[0], attention.values[0]
    assert mask is not None
    query_length, key_length = stream.longest, key.shape[2]
    chosen = config(stream.query, attention)
    query_blocks = ceil_div(query_length, chosen.constants["BLOCK_M"])
    key_blocks = ceil_div(key_length, chosen.constants["BLOCK_N"])
    one_query, one_key = mask.shape[2] == 1, mask.shape[3] == 1
    size = (mask.shape[0], mask.shape[1], query_blocks if one_query else query_length,
            key_blocks if one_key else key_length)  # fmt: skip
    partial = deltas.new_empty(size)
    launch(
        _mask_gradient,
        (mask.shape[0] * mask.shape[1] * query_blocks * key_blocks,),
        *(stream.query, stream.grad_out, stream.row_max, stream.log_sum, deltas),
        *(key, value, attention.padding[0], mask, partial),
        *(query_length, key_length, stream.batch, stream.heads, mask.shape[0], mask.shape[1]),
        *(token_strides(stream.query), token_strides(stream.grad_out), odd(stream.statistics_strides)),
        *(token_strides(key), token_strides(value), attention.masks()[2]),
        *attention.windows(),
        *attention.randomness(),
        *(attention.scale, attention.softcap or None),
        **options(attention, stream.query, stream.heads),
        ONE_QUERY=one_query,
        ONE_KEY=one_key,
        config=chosen,
    )
    if one_query:
        partial = partial.sum(2, keepdim=True)
    if one_key:
        partial = partial.sum(3, keepdim=True)
    return partial.to(mask.dtype)
