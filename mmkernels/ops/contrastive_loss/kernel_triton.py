"""contrastive_loss on GPUs.

    z = s x yᵀ,  q_ij = (1 − ε) [j positive for i] / positives of i + ε / N
    loss = −Σ_ij q_ij log p_ij / (2 total), p = softmax_j z, and the same over the columns where symmetric
    d_ij = p_ij − q_ij, + the columns';  dx_i = s/(2 total) Σ_j d_ij y_j,  ds = Σ_ij d_ij x_i·y_j / (2 total)

Tiling     Forward: a program owns a tile of scores, which stays in its registers, and leaves each row's and column's
           maximum, sum and target over the tile; torch puts those of all tiles together, in their order. Backward: the
           tiles are computed again, a strip of rows at a time, and multiplied with y and x.
Precision  products in the inputs' dtype with float32 sums; slopes, without s/(2 total), rounded to the inputs' dtype.
Limits     any D. Partial results of a strip are as many as a 128th of its scores, or a 64th in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._products import matmul
from mmkernels.ops.contrastive_loss.op import Arguments
from mmkernels.triton.attention import LOG2_E
from mmkernels.triton.contrastive import SLOPE_PAIRS, Gradients, config, cosines, gain, slope_stride, strips
from mmkernels.triton.launch import ceil_div, dot_precision, launch, tiles


@triton.jit
def _sign_and_exponents(scale):
    """The sign of s, which the products take so that their maximum is the logits', and |s| as exponents of 2."""
    s = tl.load(scale).to(tl.float32)
    return tl.where(s < 0.0, -1.0, 1.0), tl.abs(s) * LOG2_E


@triton.jit
def _positives(row_labels, column_labels, i, j, rows, columns, first_target):
    """[M, N]: which columns are positives of which rows."""
    if row_labels is not None:
        of_rows = tl.load(row_labels + i, mask=i < rows, other=0)
        of_columns = tl.load(column_labels + j, mask=j < columns, other=0)
        same = of_rows[:, None] == of_columns[None, :]
    else:
        same = (i + first_target)[:, None] == j[None, :]
    return same


@triton.jit
def _store_parts(
    parts,  # maximum m of the products p, Σ e^{s (p − m)}, Σ q and Σ q (p − m) of each row (or column) over each tile
    size,  # of each of the four
    at,
    stored,
    p,
    exponents,
    inside,
    positive,
    weight,
    uniform,
    SMOOTHED: tl.constexpr,
    AXIS: tl.constexpr,
):
    top = tl.max(tl.where(inside, p, -float("inf")), AXIS)
    top = tl.where(stored, top, 0.0)
    lower = p - tl.expand_dims(top, AXIS)
    total = tl.sum(tl.where(inside, tl.exp2(lower * exponents), 0.0), AXIS)
    share = weight * tl.sum(positive.to(tl.float32), AXIS)
    target = weight * tl.sum(tl.where(positive, lower, 0.0), AXIS)
    if SMOOTHED:
        share += uniform * tl.sum(inside.to(tl.float32), AXIS)
        target += uniform * tl.sum(tl.where(inside, lower, 0.0), AXIS)
    tl.store(parts + at, top, mask=stored)
    tl.store(parts + size + at, total, mask=stored)
    tl.store(parts + 2 * size + at, share, mask=stored)
    tl.store(parts + 3 * size + at, target, mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "first_target"])
def _statistics(
    x,  # [rows, D]
    y,  # [columns, D]
    scale,  # 0-d
    row_labels,  # [rows] or None
    column_labels,  # [columns] or None
    row_weights,  # [rows] float32, (1 − ε) / positives, or None where each row has one
    column_weights,  # [columns] float32 or None
    row_parts,  # [4, column tiles, rows] float32
    column_parts,  # [4, row tiles, columns] float32, or None where only the rows count
    rows,
    columns,
    features,
    first_target,
    x_stride,
    y_stride,
    confidence,  # 1 − ε
    uniform,  # ε / N
    SMOOTHED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    i = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    j = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    p = cosines(x, y, i, j, rows, columns, features, x_stride, y_stride, BLOCK_K, PRECISION)
    sign, exponents = _sign_and_exponents(scale)
    p *= sign
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    positive = inside & _positives(row_labels, column_labels, i, j, rows, columns, first_target)
    weight = confidence
    if row_weights is not None:
        weight = tl.load(row_weights + i, mask=i < rows, other=0.0)
    at = column_tile.to(tl.int64) * rows + i
    _store_parts(
        row_parts,
        tl.cast(column_tiles, tl.int64) * rows,
        at,
        i < rows,
        p,
        exponents,
        inside,
        positive,
        weight,
        uniform,
        SMOOTHED,
        1,
    )
    if column_parts is not None:
        weight = confidence
        if column_weights is not None:
            weight = tl.load(column_weights + j, mask=j < columns, other=0.0)
        size, at = tl.cdiv(rows, BLOCK_M).to(tl.int64) * columns, row_tile.to(tl.int64) * columns + j
        _store_parts(column_parts, size, at, j < columns, p, exponents, inside, positive, weight, uniform, SMOOTHED, 0)


@triton.jit
def _probabilities(p, exponents, statistics, totals, at, length, AXIS: tl.constexpr):
    """e^{s (p − max)} / Σ, the maximum first, so that large logits lose nothing."""
    top = tl.load(statistics + at, mask=at < length, other=0.0)
    total = tl.load(statistics + totals + at, mask=at < length, other=1.0)
    return tl.exp2((p - tl.expand_dims(top, AXIS)) * exponents) * tl.expand_dims(1.0 / total, AXIS)


@triton.jit(do_not_specialize=["all_rows", "rows", "columns", "first_target"])
def _slopes(
    x,  # [rows, D]
    y,  # [columns, D]
    scale,  # 0-d
    row_labels,  # [rows] or None
    column_labels,  # [columns] or None
    row_weights,  # [rows] float32 or None
    column_weights,  # [columns] float32 or None
    row_statistics,  # [2, all rows] float32: m and Σ e^{s (p − m)}, from the strip's first row on
    column_statistics,  # [2, columns] float32, or None where only the rows count
    slopes,  # [rows, columns] or None
    dscale,  # [tiles] float32 or None
    all_rows,
    rows,
    columns,
    features,
    first_target,
    x_stride,
    y_stride,
    slope_stride,
    confidence,
    uniform,
    gain,  # what the slopes are stored multiplied by
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    i = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    p = cosines(x, y, i, j, rows, columns, features, x_stride, y_stride, BLOCK_K, PRECISION)
    sign, exponents = _sign_and_exponents(scale)
    p *= sign
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    positive = _positives(row_labels, column_labels, i, j, rows, columns, first_target)
    weight = p * 0.0 + confidence
    if row_weights is not None:
        weight = p * 0.0 + tl.load(row_weights + i, mask=i < rows, other=0.0)[:, None]
    d = _probabilities(p, exponents, row_statistics, all_rows, i, rows, 1) - uniform
    if column_statistics is not None:
        d += _probabilities(p, exponents, column_statistics, columns, j, columns, 0) - uniform
        if column_weights is not None:
            weight += tl.load(column_weights + j, mask=j < columns, other=0.0)[None, :]
        else:
            weight += confidence
    d = tl.where(inside, tl.where(positive, d - weight, d), 0.0)
    if dscale is not None:
        tl.store(dscale + tl.program_id(0), tl.sum(d * p) * sign)
    if slopes is not None:
        at = i.to(tl.int64)[:, None] * slope_stride + j[None, :]
        tl.store(slopes + at, (d * gain).to(slopes.dtype.element_ty), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------

_STATISTICS_PAIRS = 1 << 27  # of a strip, whose partial results then take 16 MB, or 32 in float32


def _target_weights(labels: Tensor | None, others: Tensor | None, confidence: float) -> Tensor | None:
    """(1 − ε) / positives of each label among others."""
    if labels is None or others is None:
        return None
    known = others.sort().values
    count = torch.searchsorted(known, labels, right=True) - torch.searchsorted(known, labels)
    return confidence / count.clamp(min=1).float()


def _merged(parts: Tensor, scale: Tensor) -> Tensor:
    """Maximum m, Σ e^{s (p − m)}, Σ q and Σ q (p − m) over parts of the pairs, [4, parts, n], merged to [4, n]."""
    tops, totals, shares, targets = parts
    top = tops.amax(0)
    below = tops - top
    share = below.masked_fill(shares == 0, 0.0) * shares  # without 0 · ∞
    return torch.stack([top, (totals * (below * scale).exp()).sum(0), shares.sum(0), (targets + share).sum(0)])


def _loss(merged: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −Σ_j q_ij log p_ij of rows (or columns), and what the backward wants of them, [2, n]."""
    _, total, share, target = merged
    return (share * total.log() - target * scale).sum(), merged[:2].clone()


def forward(a: Arguments, training: bool) -> tuple[Tensor, ...]:
    x, y, logit_scale, row_labels, column_labels, label_smoothing, symmetric, first_target, total, keeps_products = a
    (rows, features), columns = x.shape, y.shape[0]
    nothing = x.new_empty((2, 0), dtype=torch.float32)
    if rows == 0 or columns == 0:
        statistics = nothing.new_zeros((2, rows)), nothing.new_zeros((2, columns) if symmetric else 0)
        kept = *statistics, x.new_empty((rows, columns) if keeps_products else 0)
        return (nothing.new_zeros(()), *(kept if training else (nothing.new_empty(0),) * 3))
    confidence = 1.0 - label_smoothing
    row_weights = _target_weights(row_labels, column_labels, confidence)
    column_weights = _target_weights(column_labels, row_labels, confidence) if symmetric else None
    size = logit_scale.abs()
    of_rows: list[Tensor] = []
    of_columns: list[Tensor] = []
    for strip in strips(rows, columns, features, _STATISTICS_PAIRS):
        count = strip.stop - strip.start
        chosen = config(x, count, columns, True)
        row_parts = nothing.new_empty((4, ceil_div(columns, chosen.constants["BLOCK_N"]), count))
        row_tiles = ceil_div(count, chosen.constants["BLOCK_M"])
        column_parts = nothing.new_empty((4, row_tiles, columns)) if symmetric else None
        launch(
            _statistics,
            (tiles(chosen, count, columns),),
            *(x[strip], y, logit_scale, None if row_labels is None else row_labels[strip], column_labels),
            *(None if row_weights is None else row_weights[strip], column_weights),
            *(row_parts, column_parts),
            *(count, columns, features, first_target + strip.start, x.stride(0), y.stride(0)),
            *(confidence, label_smoothing / columns),
            SMOOTHED=label_smoothing != 0.0,
            PRECISION=dot_precision(x),
            config=chosen,
        )
        of_rows.append(_merged(row_parts, size))
        if column_parts is not None:
            of_columns.append(_merged(column_parts, size))
    loss, row_statistics = _loss(torch.cat(of_rows, 1), size)
    column_statistics = nothing.new_empty(0)
    if symmetric:
        of_column, column_statistics = _loss(_merged(torch.stack(of_columns, 1), size), size)
        loss += of_column
    loss *= 0.5 / max(total, 1)
    if not training:
        return loss, *(nothing.new_empty(0),) * 3
    products = x.new_empty(0)
    if keeps_products:  # for another backend's backward: this one makes them tile by tile
        products = matmul(x, y.mT)
        products = torch.where(logit_scale < 0, -products, products)
    return loss, row_statistics, column_statistics, products


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x, y, logit_scale, row_labels, column_labels, label_smoothing, symmetric, first_target, total, _ = a
    row_statistics, column_statistics, _ = saved
    (rows, features), columns = x.shape, y.shape[0]
    confidence = 1.0 - label_smoothing
    row_weights = _target_weights(row_labels, column_labels, confidence)
    column_weights = _target_weights(column_labels, row_labels, confidence) if symmetric else None
    g = grads[0] * (0.5 / max(total, 1))
    gradients = Gradients(x, y, g * logit_scale, (needed[0], needed[1]), x.dtype)
    dscales: list[Tensor] = []
    for strip in strips(rows, columns, features, SLOPE_PAIRS):
        count = strip.stop - strip.start
        chosen = config(x, count, columns)
        slopes = x.new_empty((count, slope_stride(columns))) if gradients.needed else None
        dscale = row_statistics.new_empty(tiles(chosen, count, columns)) if needed[2] else None
        launch(
            _slopes,
            (tiles(chosen, count, columns),),
            *(x[strip], y, logit_scale, None if row_labels is None else row_labels[strip], column_labels),
            *(None if row_weights is None else row_weights[strip], column_weights),
            *(row_statistics[:, strip], column_statistics if symmetric else None, slopes, dscale),
            *(
                rows,
                count,
                columns,
                features,
                first_target + strip.start,
                x.stride(0),
                y.stride(0),
                slope_stride(columns),
            ),
            *(confidence, label_smoothing / max(columns, 1), gain(x)),
            PRECISION=dot_precision(x),
            config=chosen,
        )
        if slopes is not None:
            gradients.add(strip, slopes)
        if dscale is not None:
            dscales.append(dscale.sum())
    dlogit_scale = logit_scale.new_zeros(()) if needed[2] else None
    if dscales and dlogit_scale is not None:
        dlogit_scale.copy_(torch.stack(dscales).sum() * g)
    return [x.new_empty(0) if d is None else d for d in (gradients.dx, gradients.dy, dlogit_scale, None, None)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A batch with enough tiles for the larger ones, with labels and without, and a small one of many features."""
    import mmkernels as mmk

    x, y = new(4096, 512), new(4096, 512)
    yield "4096x512", lambda: mmk.contrastive_loss(x, y, new())
    labels = new(4096, dtype=torch.int64)
    yield (
        "4096x512, labels, smoothed",
        lambda: mmk.contrastive_loss(x, y, new(), labels=labels, label_smoothing=0.1),
    )
    few, others = new(256, 1024), new(256, 1024)
    yield "256x1024", lambda: mmk.contrastive_loss(few, others, new())
