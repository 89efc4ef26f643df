"""The backward of bidirectional_cross_attention on GPUs.

    P = exp(S − max_x) / sum_x,   R = exp(S − max_y) / sum_y      rows and columns of one matrix of scores
    dS = P ∘ (dx_out y_valueᵀ − Δx) + R ∘ (x_value dy_outᵀ − Δy),   Δ = rowsum(out ∘ dout);   0 where the clamp held S
    dx_query = scale · dS y_key,  dy_key = scale · dSᵀ x_query,  dy_value = Pᵀ dx_out,  dx_value = R dy_out

Tiling     the forward's: seven products of a tile. dy_key and dy_value stay in registers along a strip; dx_query and
           dx_value are written where y is one block, else as partial sums, wave by wave. torch adds up what programs
           have, in their order.
Precision  products in the inputs' dtype with float32 sums; P, R and dS rounded to it for theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._triton import dense
from mmkernels.ops.bidirectional_cross_attention.forward_triton import (
    LENGTHS,
    cleaned,
    load_side,
    real_tokens,
    scores,
    walk,
)
from mmkernels.ops.bidirectional_cross_attention.op import Arguments
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.triton.attention import LOG2_E, load_statistics, store_tokens
from mmkernels.triton.attention_backward import Queries
from mmkernels.triton.attention_inputs import padded_dims, token_strides
from mmkernels.triton.launch import Config, dot_precision, launch, target


@triton.jit
def _store(
    base,  # of a gradient [B, H, Lx, features] where WHOLE, else of partial sums [parts, BLOCK]
    strides,
    part,
    b,
    h,
    m,
    length,
    inside,
    features,
    x,
    WHOLE: tl.constexpr,
):
    if WHOLE:
        store_tokens(base + b * strides[0] + h * strides[1], strides[2], m, length, features, x)
    else:
        at = base + part[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]
        tl.store(at, x, mask=inside[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def _backward(
    x_query,  # [B, H, Lx, D]
    y_key,  # [B, H, Ly, D]
    x_value,  # [B, H, Lx, Dv]
    y_value,  # [B, H, Ly, Dv]
    x_grad,  # of x_out [B, H, Lx, Dv]
    y_grad,
    x_mask,  # [B, Lx] bool, contiguous, or None
    y_mask,  # [B, Ly]
    x_maxes,  # [B, H, Lx], as the deltas
    x_logs,
    x_deltas,
    y_maxes,  # [B, H, Ly]
    y_logs,
    y_deltas,
    dx_query,  # or None; partial sums [y blocks, B·H·wave, BLOCK_D] float32 where y has several blocks
    dx_value,
    dy_key,  # partial sums [strips, B·H·Ly, BLOCK_D], or None
    dy_value,
    x_length,
    y_length,
    heads,
    wave_first,
    wave_length,
    strip,
    query_strides,  # batch, head, token
    key_strides,
    x_value_strides,
    y_value_strides,
    x_grad_strides,
    y_grad_strides,
    dx_query_strides,
    dx_value_strides,
    scale,
    clamp,
    D: tl.constexpr,
    DV: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    blocks = tl.cdiv(y_length, BLOCK_N)
    block, slice = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    slices = tl.num_programs(0) // blocks
    b, h = tl.cast(slice // heads, tl.int64), tl.cast(slice % heads, tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y_real = real_tokens(y_mask, b, n, y_length)
    k = load_side(y_key, key_strides, b, h, n, y_length, D, BLOCK_D)
    y_v = load_side(y_value, y_value_strides, b, h, n, y_length, DV, BLOCK_DV)
    y_g = load_side(y_grad, y_grad_strides, b, h, n, y_length, DV, BLOCK_DV)
    y_slice = slice.to(tl.int64) * y_length
    y_max, y_log, y_delta = load_statistics(y_maxes + y_slice, y_logs + y_slice, y_deltas + y_slice, n, y_length)
    column = (tl.program_id(1) * slices + slice).to(tl.int64) * y_length + n
    kept = ((n < y_length) & (wave_first > 0))[:, None]
    if dy_key is not None:
        dk_at = dy_key + column[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        dk = tl.load(dk_at, mask=kept, other=0.0)
    if dy_value is not None:
        dv_at = dy_value + column[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
        dv = tl.load(dv_at, mask=kept, other=0.0)
    x_slice = slice.to(tl.int64) * x_length
    begin = wave_first + tl.program_id(1) * strip
    end = tl.minimum(tl.minimum(begin + strip, wave_first + wave_length), x_length)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x_real = real_tokens(x_mask, b, m, x_length)
        q = load_side(x_query, query_strides, b, h, m, x_length, D, BLOCK_D)
        x_v = load_side(x_value, x_value_strides, b, h, m, x_length, DV, BLOCK_DV)
        x_g = load_side(x_grad, x_grad_strides, b, h, m, x_length, DV, BLOCK_DV)
        x_max, x_log, x_delta = load_statistics(x_maxes + x_slice, x_logs + x_slice, x_deltas + x_slice, m, x_length)
        s, passes = scores(q, k, scale, clamp, PRECISION)
        p = tl.exp2((s - x_max[:, None] - x_log[:, None]) * LOG2_E)
        p = tl.where(y_real[None, :], p, 0.0)
        r = tl.exp2((s - y_max[None, :] - y_log[None, :]) * LOG2_E)
        r = tl.where(x_real[:, None], r, 0.0)
        dp = tl.dot(x_g, tl.trans(y_v), input_precision=PRECISION)
        dr = tl.dot(x_v, tl.trans(y_g), input_precision=PRECISION)
        ds = tl.where(y_real[None, :], p * (dp - x_delta[:, None]), 0.0)
        ds += tl.where(x_real[:, None], r * (dr - y_delta[None, :]), 0.0)
        rounded = tl.where(passes, ds, 0.0).to(q.dtype)
        inside = m < wave_first + wave_length
        part = (block * slices + slice).to(tl.int64) * wave_length + m - wave_first
        if dx_query is not None:
            dq = tl.dot(rounded, k, input_precision=PRECISION) * scale
            _store(dx_query, dx_query_strides, part, b, h, m, x_length, inside, D, dq, WHOLE)
        if dx_value is not None:
            dx_v = tl.dot(r.to(y_g.dtype), y_g, input_precision=PRECISION)
            _store(dx_value, dx_value_strides, part, b, h, m, x_length, inside, DV, dx_v, WHOLE)
        if dy_key is not None:
            dk += tl.dot(tl.trans(rounded), q, input_precision=PRECISION)
        if dy_value is not None:
            dv += tl.dot(tl.trans(p.to(x_g.dtype)), x_g, input_precision=PRECISION)
    if dy_key is not None:
        tl.store(dk_at, dk, mask=(n < y_length)[:, None])
    if dy_value is not None:
        tl.store(dv_at, dv, mask=(n < y_length)[:, None])


def _config(x: Tensor, widest: int) -> Config:
    """Two sums as wide as a head, two tiles of weights and two of their gradients fit in the registers of every
    target."""
    machine = target(x)
    if x.dtype == torch.float32 or machine.backend != "cuda":
        return Config({"BLOCK_M": 16, "BLOCK_N": 16}, 4 if x.dtype == torch.float32 and widest <= 32 else 8, 1)
    return Config({"BLOCK_M": 32, "BLOCK_N": 64 if widest <= 64 and machine.arch >= 90 else 32}, 8, 1)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp = a
    if scale is None:
        scale = max(x_query.shape[3], 1) ** -0.5
    x_out, y_out, x_stats, y_stats = saved
    queries, values = (x_query, y_key), (x_value, y_value)
    of_queries, of_values = needed[:2], needed[2:4]
    dqueries = [empty_in_order_of(t, t.shape) if n else None for t, n in zip(queries, of_queries, strict=True)]
    dvalues = [empty_in_order_of(t, t.shape) if n else None for t, n in zip(values, of_values, strict=True)]
    sides = []
    for i, (mask, out, stats) in enumerate(((x_mask, x_out, x_stats), (y_mask, y_out, y_stats))):
        query, value, grad = cleaned(dense(queries[i]), mask), cleaned(dense(values[i]), mask), dense(grads[i])
        stream = Queries(query, grad, dense(out), stats[0], stats[1], None, query.shape[0], query.shape[2])
        sides.append((stream, value, mask, dqueries[i], dvalues[i]))
    if x_query.shape[2] < y_key.shape[2]:
        sides.reverse()
    _pull(sides[0], sides[1], scale, clamp)
    for x, mask, gradient in zip((*queries, *values), (x_mask, y_mask) * 2, (*dqueries, *dvalues), strict=True):
        if gradient is not None and mask is not None:  # what counts as zero has a gradient of zero
            gradient.masked_fill_(~mask[:, None, :, None] & ~x.isfinite(), 0)
    found = (*dqueries, *dvalues, None, None)
    return [grads[0].new_empty(0) if g is None else g for g in found]


_Side = tuple[Queries, Tensor, Tensor | None, Tensor | None, Tensor | None]


def _pull(x: _Side, y: _Side, scale: float, clamp: float | None) -> None:
    (x_stream, x_value, x_mask, dx_query, dx_value), (y_stream, y_value, y_mask, dy_key, dy_value) = x, y
    query, key = x_stream.query, y_stream.query
    (batch, heads, x_length, _), y_length = query.shape, key.shape[2]
    gradients = [g for g in (dx_query, dx_value, dy_key, dy_value) if g is not None]
    if 0 in (batch, heads, x_length, y_length):
        for g in gradients:
            g.zero_()
        return
    slices = batch * heads
    dims = padded_dims(query.shape[3], x_value.shape[3])
    blocks = (dims["BLOCK_D"], dims["BLOCK_DV"])
    config = _config(query, max(blocks))
    plan = walk(x_length, y_length, slices, sum(blocks), config)
    whole = plan.y_blocks == 1

    def partial(wanted: Tensor | None, parts: int, length: int, block: int) -> Tensor | None:
        size = (parts, batch, heads, length, block)
        return None if wanted is None else query.new_empty(size, dtype=torch.float32)

    columns = [partial(g, plan.strips, y_length, n) for g, n in zip((dy_key, dy_value), blocks, strict=True)]
    deltas = x_stream.deltas(), y_stream.deltas()
    statistics = [(s.row_max, s.log_sum, d) for s, d in zip((x_stream, y_stream), deltas, strict=True)]
    for first, length in plan.waves():
        rows: list[Tensor | None] = [dx_query, dx_value]
        if not whole:
            rows = [partial(g, plan.y_blocks, length, n) for g, n in zip(rows, blocks, strict=True)]
        launch(
            _backward,
            (plan.y_blocks * slices, plan.strips),
            *(query, key, x_value, y_value, x_stream.grad_out, y_stream.grad_out),
            *(None if m is None else m.contiguous() for m in (x_mask, y_mask)),
            *(*statistics[0], *statistics[1], *rows, *columns),
            *(x_length, y_length, heads, first, length, plan.strip),
            *(token_strides(t) for t in (query, key, x_value, y_value, x_stream.grad_out, y_stream.grad_out)),
            *((0, 0, 0) if g is None else token_strides(g) for g in (dx_query, dx_value)),
            *(scale, clamp),
            **dims,
            WHOLE=whole,
            PRECISION=dot_precision(query),
            config=config,
        )
        if not whole:
            for dx, part in zip((dx_query, dx_value), rows, strict=True):
                if dx is not None and part is not None:
                    dx[:, :, first : first + length].copy_(part.sum(0)[..., : dx.shape[3]])
    for dy, part, factor in zip((dy_key, dy_value), columns, (scale, 1.0), strict=True):
        if dy is not None and part is not None:
            dy.copy_(part.sum(0)[..., : dy.shape[3]].mul_(factor))
