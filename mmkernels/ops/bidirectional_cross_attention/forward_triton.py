"""bidirectional_cross_attention on GPUs: the forward, and what the backward shares with it.

    S = clamp(scale · X Yᵀ),  x_out = softmax over y (S) · y_value,  y_out = softmax over x (Sᵀ) · x_value

Tiling     x is the longer side. A program owns a strip of x of one (batch element, head) and a block of y, and walks
           along the strip: a tile of scores is formed once, and goes into the sums of its rows, which are complete
           where y is one block, and into those of its columns, which stay in registers along the strip. What programs
           have of a row or a column is merged in their order. Where rows have partial sums, x goes in waves, whose sums
           of columns go on where the last wave's ended, so that no workspace grows with Lx · Ly.
Precision  products in the inputs' dtype with float32 sums; exponentials of each softmax rounded to it for the products
           with values.
Limits     head dims up to 128, of float32 up to 64; what fits of wider heads is slower than scores in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._triton import dense
from mmkernels.ops.bidirectional_cross_attention.op import Arguments
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.triton.attention import LOG2_E, load_tokens, store_tokens
from mmkernels.triton.attention_forward import merge_shares, partial_sums
from mmkernels.triton.attention_inputs import padded_dims, token_strides
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, target

LENGTHS = ["x_length", "y_length", "heads", "wave_first", "wave_length", "strip"]


@triton.jit
def real_tokens(mask, b, token, length):
    """Which tokens of a side are there and no padding."""
    real = token < length
    if mask is not None:
        real = tl.load(mask + b * length + token, mask=real, other=0) != 0
    return real


@triton.jit
def load_side(base, strides, b, h, token, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of a side."""
    return load_tokens(base + b * strides[0] + h * strides[1], strides[2], token, length, D, BLOCK_D)


@triton.jit
def scores(q, k, scale, clamp, PRECISION: tl.constexpr):
    """A tile [M, N] of scores, and where the clamp lets a gradient pass."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    passes = tl.full(s.shape, True, tl.int1)
    if clamp is not None:
        passes = tl.abs(s) <= clamp
        s = tl.where(s > clamp, clamp, tl.where(s < -clamp, -clamp, s))  # a NaN stays
    return s, passes


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    x_query,  # [B, H, Lx, D]
    y_key,  # [B, H, Ly, D]
    x_value,  # [B, H, Lx, Dv]
    y_value,  # [B, H, Ly, Dv]
    x_mask,  # [B, Lx] bool, contiguous, or None
    y_mask,  # [B, Ly]
    rows,  # x_out where y is one block, else partial sums [y blocks, B·H·wave, BLOCK_DV]
    row_maxes,  # [B, H, Lx] or None, else [y blocks, B·H·wave]
    row_sums,  # logarithms of sums, else sums
    columns,  # partial sums [strips, B·H·Ly, BLOCK_DV]
    column_maxes,  # [strips, B·H·Ly]
    column_sums,
    x_length,
    y_length,
    heads,
    wave_first,  # the tokens of x in this launch
    wave_length,
    strip,  # tokens of x of a program
    query_strides,  # batch, head, token
    key_strides,
    x_value_strides,
    y_value_strides,
    row_strides,
    scale,
    clamp,  # or None
    D: tl.constexpr,
    DV: tl.constexpr,
    WHOLE: tl.constexpr,  # y is one block
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
    column = (tl.program_id(1) * slices + slice).to(tl.int64) * y_length + n
    kept = (n < y_length) & (wave_first > 0)
    column_max = tl.load(column_maxes + column, mask=kept, other=-float("inf"))
    column_sum = tl.load(column_sums + column, mask=kept, other=0.0)
    column_at = columns + column[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    column_acc = tl.load(column_at, mask=kept[:, None], other=0.0)
    begin = wave_first + tl.program_id(1) * strip
    end = tl.minimum(tl.minimum(begin + strip, wave_first + wave_length), x_length)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        x_real = real_tokens(x_mask, b, m, x_length)
        q = load_side(x_query, query_strides, b, h, m, x_length, D, BLOCK_D)
        x_v = load_side(x_value, x_value_strides, b, h, m, x_length, DV, BLOCK_DV)
        s, _passes = scores(q, k, scale, clamp, PRECISION)
        of_rows = tl.where(y_real[None, :], s, -float("inf"))
        row_max = tl.max(of_rows, 1)
        shift = tl.where(row_max == -float("inf"), 0.0, row_max)
        p = tl.exp2((of_rows - shift[:, None]) * LOG2_E)
        row_sum = tl.sum(p, 1)
        row_acc = tl.dot(p.to(y_v.dtype), y_v, input_precision=PRECISION)
        if WHOLE:
            empty = row_sum == 0.0
            row_acc = tl.where(empty[:, None], 0.0, row_acc / tl.where(empty, 1.0, row_sum)[:, None])
            row_at = rows + b * row_strides[0] + h * row_strides[1]
            store_tokens(row_at, row_strides[2], m, x_length, DV, row_acc)
            if row_maxes is not None:
                at = slice.to(tl.int64) * x_length + m
                tl.store(row_maxes + at, row_max, mask=m < x_length)
                log_sum = tl.where(empty, -float("inf"), tl.log(tl.where(empty, 1.0, row_sum)))
                tl.store(row_sums + at, log_sum, mask=m < x_length)
        else:
            inside = m < wave_first + wave_length
            at = (block * slices + slice).to(tl.int64) * wave_length + m - wave_first
            tl.store(row_maxes + at, row_max, mask=inside)
            tl.store(row_sums + at, row_sum, mask=inside)
            row_at = rows + at[:, None] * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
            tl.store(row_at, row_acc, mask=inside[:, None])
        of_columns = tl.where(x_real[:, None], s, -float("inf"))
        higher = tl.maximum(column_max, tl.max(of_columns, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        r = tl.exp2((of_columns - shift[None, :]) * LOG2_E)
        rescale = tl.exp2((column_max - shift) * LOG2_E)
        column_max = higher
        column_sum = column_sum * rescale + tl.sum(r, 0)
        column_acc = column_acc * rescale[:, None]
        column_acc += tl.dot(tl.trans(r.to(x_v.dtype)), x_v, input_precision=PRECISION)
    tl.store(column_maxes + column, column_max, mask=n < y_length)
    tl.store(column_sums + column, column_sum, mask=n < y_length)
    tl.store(column_at, column_acc, mask=(n < y_length)[:, None])


# --- launches ---------------------------------------------------------------------------------------------------------

_PROGRAMS = 264  # two for each multiprocessor of a large GPU
_WORKSPACE = 1 << 28  # bytes of partial sums of rows, at most


@dataclass(frozen=True)
class Walk:
    """How the tokens of x are shared among programs and launches."""

    y_blocks: int
    strip: int  # tokens of x of a program
    strips: int  # of a wave
    wave: int  # tokens of x of a launch
    x_length: int

    def waves(self) -> Iterator[tuple[int, int]]:
        """First token and number of tokens of each."""
        for first in range(0, self.x_length, self.wave):
            yield first, min(self.wave, self.x_length - first)


def walk(x_length: int, y_length: int, slices: int, features: int, config: Config) -> Walk:
    """Strips that fill a GPU, and waves that keep float32 rows of so many features of each block of y in bounds."""
    block, y_blocks = config.constants["BLOCK_M"], ceil_div(y_length, config.constants["BLOCK_N"])
    of_token = 4 * features * slices * y_blocks if y_blocks > 1 else 0
    most = x_length if of_token == 0 else max(_WORKSPACE // of_token, block)
    blocks = min(ceil_div(x_length, block), max(most // block, 1))
    strips = max(min(blocks, ceil_div(_PROGRAMS, max(slices * y_blocks, 1))), 1)
    strip = max(ceil_div(blocks, strips), 1) * block
    strips = max(ceil_div(blocks * block, strip), 1)
    return Walk(y_blocks, strip, strips, strip * strips, x_length)


def cleaned(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, L, D] with zeros for what is not finite in padding: the kernels have no registers for it."""
    return x if mask is None else torch.where(mask[:, None, :, None], x, x.nan_to_num(0, 0, 0))


def _config(x: Tensor, widest: int) -> Config:
    """Two sums as wide as a head and two tiles of exponentials fit in the registers of every target."""
    if x.dtype == torch.float32:
        return Config({"BLOCK_M": 16, "BLOCK_N": 32 if widest <= 64 else 16}, 8, 1)
    machine = target(x)
    if machine.backend != "cuda":
        return Config({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1)
    if widest <= 64 and machine.arch == 90:
        return Config({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
    return Config({"BLOCK_M": 64, "BLOCK_N": 64 if machine.arch >= 90 else 32}, 8, 1)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp = a
    width = x_value.shape[3]
    outs = [empty_in_order_of(side, (*side.shape[:3], width)) for side in (x_query, y_key)]
    size = [(3, *side.shape[:3]) if training else (0,) for side in (x_query, y_key)]
    stats = [x_query.new_zeros(s, dtype=torch.float32) for s in size]  # nothing rounds row_max here
    if scale is None:
        scale = max(x_query.shape[3], 1) ** -0.5
    sides = [
        (cleaned(dense(x_query), x_mask), cleaned(dense(x_value), x_mask), x_mask, outs[0], stats[0]),
        (cleaned(dense(y_key), y_mask), cleaned(dense(y_value), y_mask), y_mask, outs[1], stats[1]),
    ]
    if x_query.shape[2] < y_key.shape[2]:
        sides.reverse()
    _attend(sides[0], sides[1], scale, clamp, training)
    return outs[0], outs[1], stats[0], stats[1]


_Side = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def _attend(x: _Side, y: _Side, scale: float, clamp: float | None, training: bool) -> None:
    (query, x_value, x_mask, x_out, x_stats), (key, y_value, y_mask, y_out, y_stats) = x, y
    batch, heads, x_length, _ = query.shape
    y_length, slices = key.shape[2], batch * heads
    if y_length == 0:
        x_out.zero_()
        x_stats.fill_(-torch.inf)
        return
    dims = padded_dims(query.shape[3], x_value.shape[3])
    config = _config(query, max(dims["BLOCK_D"], dims["BLOCK_DV"]))
    plan = walk(x_length, y_length, slices, dims["BLOCK_DV"] + 2, config)
    columns = partial_sums(query, plan.strips, slices * y_length, dims["BLOCK_DV"])
    whole, statistics = plan.y_blocks == 1, (x_stats[0], x_stats[1]) if training else None
    for first, length in plan.waves():
        rows: Sequence[Tensor | None] = (x_out, *(statistics or (None, None)))
        if not whole:
            rows = partials = partial_sums(query, plan.y_blocks, slices * length, dims["BLOCK_DV"])
        launch(
            _forward,
            (plan.y_blocks * slices, plan.strips),
            *(query, key, x_value, y_value, *(None if m is None else m.contiguous() for m in (x_mask, y_mask))),
            *(*rows, *columns, x_length, y_length, heads, first, length, plan.strip),
            *(token_strides(t) for t in (query, key, x_value, y_value, x_out)),
            *(scale, clamp),
            **dims,
            WHOLE=whole,
            PRECISION=dot_precision(query),
            config=config,
        )
        if not whole:
            merge_shares(partials, x_out, statistics, first)
    merge_shares(columns, y_out, (y_stats[0], y_stats[1]) if training else None)
