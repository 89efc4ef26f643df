"""tensor_fusion_linear on GPUs.

    y = A Wᵀ + b,   A[b, e] = Π_k f_k[b, i_k(e)],   f = [1; x],   i_k(e) the indices of entry e, the last one fastest

Tiling     A is formed tile by tile in registers, each entry gathered from rows of x that the first cache holds.
           Forward: a program owns rows and outputs and a share of the entries; torch adds the shares up, in order.
           dW: a program owns entries of W and walks over the rows. dx, one launch per modality: a program owns rows
           and a share of the entries; dA of a tile of these, times the other factors, is summed by index at once, as
           a product with one-hot columns.
Precision  sums in float32; A and dA·f rounded to the inputs' dtype, as plain code rounds them.
Limits     none; of a modality with more than 127 features, dA is formed once for every 128 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._rows import gradients_where_present
from mmkernels.ops.concat_linear.reference import where_present
from mmkernels.ops.tensor_fusion_linear.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, next_power_of_2

_LENGTHS = ["rows", "share", "column"]


@triton.jit
def _factor(x_ptr, stride, first, i, inside):
    """f[first + m, i] in float32, 1 outside. Rows of a tile lie within 32 bits of each other."""
    m = tl.arange(0, inside.shape[0])
    tile_ptr = x_ptr + tl.cast(first, tl.int64) * stride
    at = m[:, None] * stride + (i - 1)[None, :]
    return tl.load(tile_ptr + at, mask=inside & (i > 0)[None, :], other=1.0).to(tl.float32)


@triton.jit
def _outer_product(xs, strides, widths, first, e, inside, SKIPPED: tl.constexpr):
    """A[first + m, e] without the factor of modality SKIPPED, and the entries' indices of that one."""
    a = tl.full(inside.shape, 1.0, tl.float32)
    skipped = e
    for k in tl.static_range(len(xs)):
        i = e % (widths[k] + 1)
        e = e // (widths[k] + 1)
        if k == SKIPPED:
            skipped = i
        else:
            a *= _factor(xs[k], strides[k], first, i, inside)
    return a, skipped


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    xs,  # each [B, D], the fastest modality first
    strides,
    widths,  # D
    weight,  # [N, E]
    partial,  # [shares, B, N] float32
    rows,  # B
    features,  # N
    entries,  # E
    share,  # entries of a program
    weight_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    tile = tl.program_id(0)
    first = tile // columns * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    n = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, tl.minimum(begin + share, entries), BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        inside = (row < rows)[:, None] & (e < entries)[None, :]
        a, _ = _outer_product(xs, strides, widths, first, e, inside, -1)
        w_at = n.to(tl.int64)[None, :] * weight_stride + e[:, None]
        w = tl.load(weight + w_at, mask=(n < features)[None, :] & (e < entries)[:, None], other=0.0)
        acc += tl.dot(a.to(w.dtype), w, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * features + n[None, :]
    tl.store(partial + at, acc, mask=(row < rows)[:, None] & (n < features)[None, :])


@triton.jit(do_not_specialize=_LENGTHS)
def _weight_gradient(
    dy,  # [B, N]
    xs,
    strides,
    widths,
    dweight,  # [N, E]
    rows,
    features,
    entries,
    dy_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    tile = tl.program_id(0)
    e = tile // columns * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for start in range(0, rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (e < entries)[None, :]
        a, _ = _outer_product(xs, strides, widths, start, e, inside, -1)
        at = row.to(tl.int64)[None, :] * dy_stride + n[:, None]
        g = tl.load(dy + at, mask=(row < rows)[None, :] & (n < features)[:, None], other=0.0)
        acc += tl.dot(g, a.to(g.dtype), input_precision=PRECISION)
    at = n.to(tl.int64)[:, None] * entries + e[None, :]
    tl.store(dweight + at, acc.to(dweight.dtype.element_ty), mask=(n < features)[:, None] & (e < entries)[None, :])


@triton.jit(do_not_specialize=_LENGTHS)
def _input_gradient(
    dy,  # [B, N]
    xs,
    strides,
    widths,
    weight,  # [N, E]
    partial,  # [shares, B, D] float32, of one modality
    rows,
    features,
    entries,
    share,  # entries of a program
    column,  # the first of [1; x] whose gradients these are
    dy_stride,
    weight_stride,
    width,  # D
    MODALITY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of [1; x]
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    c = column + tl.arange(0, BLOCK_C)
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(begin, tl.minimum(begin + share, entries), BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        da = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for n0 in range(0, features, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            g_at = row.to(tl.int64)[:, None] * dy_stride + n[None, :]
            g = tl.load(dy + g_at, mask=(row < rows)[:, None] & (n < features)[None, :], other=0.0)
            w_at = n.to(tl.int64)[:, None] * weight_stride + e[None, :]
            w = tl.load(weight + w_at, mask=(n < features)[:, None] & (e < entries)[None, :], other=0.0)
            da += tl.dot(g, w, input_precision=PRECISION)
        inside = (row < rows)[:, None] & (e < entries)[None, :]
        others, i = _outer_product(xs, strides, widths, first, e, inside, MODALITY)
        chosen = (i[:, None] == c[None, :]).to(weight.dtype.element_ty)  # [E, C]
        acc += tl.dot((da * others).to(chosen.dtype), chosen, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * width + (c - 1)[None, :]
    tl.store(partial + at, acc, mask=(row < rows)[:, None] & (c > 0)[None, :] & (c <= width)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------

_COLUMNS = 128  # of a modality's gradient that a program holds
_PROGRAMS = 256  # to share the entries among: two for each multiprocessor of a large GPU


def _config(x: Tensor, rows: int) -> Config:
    """Few rows, since each gathers its entries, by many threads; a float32 product takes three passes and registers."""
    block_m, single = 16 if rows <= 16 else 32, x.dtype == torch.float32
    sizes = {"BLOCK_M": block_m, "BLOCK_N": 32 if single and block_m == 32 else 64, "BLOCK_E": 32 if single else 64}
    return Config(sizes, num_warps=8)


def _share(entries: int, tiles: int, block: int) -> tuple[int, int]:
    """Entries of a program, and how many programs share them, at least four blocks each."""
    shares = max(min(_PROGRAMS // max(tiles, 1), ceil_div(entries, 4 * block)), 1)
    share = ceil_div(ceil_div(entries, shares), block) * block
    return share, ceil_div(entries, share)


def _modalities(xs: Sequence[Tensor]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Tensors, strides and widths, the fastest modality first."""
    xs = tuple(reversed(xs))
    return xs, tuple(x.stride(0) for x in xs), tuple(x.shape[1] for x in xs)


def forward(a: Arguments, training: bool) -> Tensor:
    xs, weight, bias, presence = a
    xs = where_present(xs, presence)
    rows, (features, entries) = xs[0].shape[0], weight.shape
    config = _config(weight, rows)
    tiles = ceil_div(rows, config.constants["BLOCK_M"]) * ceil_div(features, config.constants["BLOCK_N"])
    share, shares = _share(entries, tiles, config.constants["BLOCK_E"])
    partial = weight.new_empty((shares, rows, features), dtype=torch.float32)
    launch(
        _forward,
        (tiles, shares),
        *(*_modalities(xs), weight, partial),
        *(rows, features, entries, share, weight.stride(0)),
        PRECISION=dot_precision(weight),
        config=config,
    )
    y = partial.sum(0) if bias is None else partial.sum(0) + bias
    return y.to(weight.dtype)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, weight, _, presence = a
    (dy,) = grads
    xs = where_present(xs, presence)
    *of_inputs, of_weight, of_bias, _ = needed
    dxs = [_input_gradient_of(i, dy, xs, weight) if n else dy.new_empty(0) for i, n in enumerate(of_inputs)]
    dxs = gradients_where_present(dxs, presence, of_inputs)
    dweight = _weight_gradient_of(dy, xs, weight) if of_weight else dy.new_empty(0)
    return [*dxs, dweight, dy.sum(0) if of_bias else dy.new_empty(0), dy.new_empty(0)]


def _weight_gradient_of(dy: Tensor, xs: Sequence[Tensor], weight: Tensor) -> Tensor:
    rows, (features, entries) = xs[0].shape[0], weight.shape
    dweight = weight.new_empty(weight.shape)
    config = _config(weight, rows)
    launch(
        _weight_gradient,
        (ceil_div(entries, config.constants["BLOCK_E"]) * ceil_div(features, config.constants["BLOCK_N"]),),
        *(dy, *_modalities(xs), dweight),
        *(rows, features, entries, dy.stride(0)),
        PRECISION=dot_precision(weight),
        config=config,
    )
    return dweight


def _input_gradient_of(modality: int, dy: Tensor, xs: Sequence[Tensor], weight: Tensor) -> Tensor:
    x = xs[modality]
    (rows, width), (features, entries) = x.shape, weight.shape
    config = _config(weight, rows)
    tiles = ceil_div(rows, config.constants["BLOCK_M"])
    share, shares = _share(entries, tiles, config.constants["BLOCK_E"])
    partial = x.new_empty((shares, rows, width), dtype=torch.float32)
    for column in range(0, width + 1 if width else 0, _COLUMNS):
        launch(
            _input_gradient,
            (tiles, shares),
            *(dy, *_modalities(xs), weight, partial),
            *(rows, features, entries, share, column, dy.stride(0), weight.stride(0), width),
            MODALITY=len(xs) - 1 - modality,
            PRECISION=dot_precision(weight),
            BLOCK_C=min(max(next_power_of_2(width + 1), 16), _COLUMNS),
            config=config,
        )
    return partial.sum(0).to(x.dtype)


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above."""
    import mmkernels as mmk

    def call(rows: int, widths: Sequence[int], features: int) -> Any:
        entries = 1
        for width in widths:
            entries *= width + 1
        return mmk.tensor_fusion_linear([new(rows, width) for width in widths], new(features, entries), new(features))

    yield "128x(32, 32, 32) to 256", lambda: call(128, (32, 32, 32), 256)
    yield "16x(64, 64) to 256", lambda: call(16, (64, 64), 256)
