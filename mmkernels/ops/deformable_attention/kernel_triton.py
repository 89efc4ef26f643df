"""deformable_attention on GPUs.

    out[b, q, h] = Σ_k a_k · sample(value[b, :, h], location_k)
    da_k = Σ share · (dout · value[row]),   dvalue[row] = Σ a_k · share · dout over the samples around the row's pixel

Tiling     Forward, and the gradients of locations and weights: a program owns rows of (batch, query, head) and features
           of them, and walks over their points. The gradient of values has owners, not atomics: every sample is named
           by the cell between four pixels in which it lies, torch sorts the names, and a program owns a pixel, whose
           samples are two runs of the sorted ones: those of the two cells above it and of the two below.
Precision  positions, shares and sums in float32. The sort is stable, so every sum has one order: the same bits every
           time, whatever `torch.use_deterministic_algorithms` says.
Limits     any D, points and levels; maps of less than 2^29 pixels in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.deformable_attention.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2, odd
from mmkernels.triton.math import number
from mmkernels.triton.sampling import corner_of, is_present, read_level, read_pixels, read_position


@triton.jit(do_not_specialize=["rows", "queries", "presence_batch", "presence_source"])
def _forward(
    values,  # of each source [B, S, H, D]
    locations,  # [B, Lq, H, K, 2], dense behind the heads
    weights,  # [B, Lq, H, K], likewise
    presence,  # [B, sources] or None
    level_of,  # [K] int32
    levels,  # [L, 4] int32
    out,  # [B, Lq, H, D]
    ends,  # of the sources' points, odd
    rows,  # B·Lq·H
    queries,
    heads,
    features,
    value_batches,  # strides
    value_rows,
    value_heads,
    location_batch,
    location_query,
    location_head,
    weight_batch,
    weight_query,
    weight_head,
    presence_batch,
    presence_source,
    DISCRETE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    head, query, batch = row % heads, row // heads % queries, row // heads // queries
    location_at = batch * location_batch + query * location_query + head * location_head
    weight_at = batch * weight_batch + query * weight_query + head * weight_head
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    begin = 0
    for i in tl.static_range(len(values)):
        end = number(ends[i])
        here = is_present(presence, inside, batch, i, presence_batch, presence_source)
        for k in range(begin, end):
            first, width, height, _ = read_level(levels, tl.load(level_of + k))
            x, y, reaches = read_position(locations, location_at + 2 * k, here, width, height, DISCRETE)
            weight = tl.load(weights + weight_at + k, mask=reaches, other=0.0).to(tl.float32)
            for corner in tl.static_range(1 if DISCRETE else 4):
                pixel, share, valid = corner_of(x, y, reaches, width, height, corner)
                pixels = read_pixels(
                    values[i], first, pixel, valid, batch, head, c, features, value_batches[i], value_rows[i],
                    value_heads[i],
                )  # fmt: skip
                acc += (weight * share)[:, None] * pixels
        begin = end
    mask = inside[:, None] & (c < features)[None, :]
    tl.store(out + row[:, None] * features + c[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_point", "end_point", "rows", "queries", "presence_batch"])
def _sample_gradients(
    g,  # [B, Lq, H·D]
    value,  # of one source [B, S, H, D]
    locations,  # [B, Lq, H, K, 2], dense behind the heads
    weights,  # [B, Lq, H, K], likewise
    presence,  # [B] of this source, or None
    level_of,  # [K] int32
    levels,  # [L, 4] int32
    dlocations,  # [B, Lq, H, K, 2] or None
    dweights,  # [B, Lq, H, K] or None
    first_point,  # this source's
    end_point,
    rows,  # B·Lq·H
    queries,
    heads,
    features,
    points,  # K
    g_batch,  # strides
    g_query,
    value_batch,
    value_row,
    value_head,
    location_batch,
    location_query,
    location_head,
    weight_batch,
    weight_query,
    weight_head,
    presence_batch,
    DISCRETE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head, query, batch = row % heads, row // heads % queries, row // heads // queries
    g_at = batch * g_batch + query * g_query + head * features
    location_at = batch * location_batch + query * location_query + head * location_head
    weight_at = batch * weight_batch + query * weight_query + head * weight_head
    here = is_present(presence, inside, batch, 0, presence_batch, 0)
    for k in range(first_point, end_point):
        first, width, height, _ = read_level(levels, tl.load(level_of + k))
        x, y, reaches = read_position(locations, location_at + 2 * k, here, width, height, DISCRETE)
        of_weight = tl.zeros([ROWS], tl.float32)
        of_x = tl.zeros([ROWS], tl.float32)
        of_y = tl.zeros([ROWS], tl.float32)
        u, v = x - tl.floor(x), y - tl.floor(y)
        for start in range(0, features, BLOCK):
            c = start + tl.arange(0, BLOCK)
            mask = reaches[:, None] & (c < features)[None, :]
            d = tl.load(g + g_at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            for corner in tl.static_range(1 if DISCRETE else 4):
                pixel, share, valid = corner_of(x, y, reaches, width, height, corner)
                pixels = read_pixels(
                    value, first, pixel, valid, batch, head, c, features, value_batch, value_row, value_head
                )
                dot = tl.sum(tl.where(valid[:, None], d * pixels, 0.0), 1)
                across = v if corner // 2 == 1 else 1.0 - v
                down = u if corner % 2 == 1 else 1.0 - u
                of_weight += share * dot
                of_x += across * dot if corner % 2 == 1 else -(across * dot)
                of_y += down * dot if corner // 2 == 1 else -(down * dot)
        at = row * points + k
        if dweights is not None:
            tl.store(dweights + at, of_weight.to(dweights.dtype.element_ty), mask=inside)
        if dlocations is not None:
            if DISCRETE:
                of_x = tl.zeros([ROWS], tl.float32)
                of_y = of_x
            else:
                weight = tl.load(weights + weight_at + k, mask=reaches, other=0.0).to(tl.float32)
                of_x = tl.where(reaches, weight * width * of_x, 0.0)
                of_y = tl.where(reaches, weight * height * of_y, 0.0)
            tl.store(dlocations + 2 * at, of_x.to(dlocations.dtype.element_ty), mask=inside)
            tl.store(dlocations + 2 * at + 1, of_y.to(dlocations.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples", "queries", "cells", "nowhere"])
def _cells(
    locations,  # [B, Lq, H, K, 2], dense behind the heads
    level_of,  # [K] int32
    levels,  # [L, 4] int32
    names,  # [B, Lq, H, K]: a sample's cell among those of all heads
    samples,  # B·Lq·H·K
    queries,
    heads,
    points,
    cells,  # of a head
    nowhere,  # the name of a sample that reaches no map
    location_batch,
    location_query,
    location_head,
    DISCRETE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = sample < samples
    k, row = sample % points, sample // points
    head, query, batch = row % heads, row // heads % queries, row // heads // queries
    level = tl.load(level_of + k, mask=inside, other=0)
    width = tl.load(levels + level * 4 + 1, mask=inside, other=0)
    height = tl.load(levels + level * 4 + 2, mask=inside, other=0)
    first = tl.load(levels + level * 4 + 3, mask=inside, other=0)
    at = batch * location_batch + query * location_query + head * location_head + 2 * k
    x, y, reaches = read_position(locations, at, inside, width, height, DISCRETE)
    if DISCRETE:
        cell = y.to(tl.int32) * width + x.to(tl.int32)
    else:
        cell = (tl.floor(y).to(tl.int32) + 1) * (width + 1) + tl.floor(x).to(tl.int32) + 1
    name = (batch * heads + head) * cells + first + cell
    tl.store(names + sample, tl.where(reaches, name, nowhere).to(names.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["queries", "rows", "first_level", "end_level", "cells"])
def _value_gradient(
    g,  # [B, Lq, H·D]
    locations,  # [B, Lq, H, K, 2], dense behind the heads
    weights,  # [B, Lq, H, K], likewise
    presence,  # [B] of this source, or None
    level_of,  # [K] int32
    levels,  # [L, 4] int32
    order,  # [samples] int64: the samples by their cells
    starts,  # [B·H·cells + 1]: where each cell's begin
    dvalue,  # [B, S, H, D] of this source
    queries,
    rows,  # S
    heads,
    features,
    points,
    first_level,  # this source's
    end_level,
    cells,  # of a head
    g_batch,  # strides
    g_query,
    location_batch,
    location_query,
    location_head,
    weight_batch,
    weight_query,
    weight_head,
    presence_batch,
    DISCRETE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK)
    owned = (tl.program_id(0) // columns).to(tl.int64)  # (batch, row, head)
    c = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    head, batch = owned % heads, owned // heads // rows
    row = (owned // heads % rows).to(tl.int32)
    first, width, height, cell = read_level(levels, first_level)
    for level in range(first_level + 1, end_level):
        next_first, next_width, next_height, next_cell = read_level(levels, level)
        here = next_first <= row  # the last such level that has rows: an empty one shares its first row with the next
        first = tl.where(here, next_first, first)
        width = tl.where(here, next_width, width)
        height = tl.where(here, next_height, height)
        cell = tl.where(here, next_cell, cell)
    column, line = (row - first) % width, (row - first) // width
    name = (batch * heads + head) * cells + cell
    present = 1
    if presence is not None:
        present = tl.load(presence + batch * presence_batch).to(tl.int32)
    acc = tl.zeros([SAMPLES, BLOCK], tl.float32)
    for side in tl.static_range(1 if DISCRETE else 2):
        if DISCRETE:
            begin = tl.load(starts + name + line * width + column)
            end = tl.load(starts + name + line * width + column + 1)
        else:
            upper_left = name + (line + side).to(tl.int64) * (width + 1) + column
            begin = tl.load(starts + upper_left)
            end = tl.load(starts + upper_left + 2)
        end = tl.where(present != 0, end, begin)
        for start in range(begin, end, SAMPLES):
            i = start + tl.arange(0, SAMPLES)
            sample = tl.load(order + i, mask=i < end, other=0)
            k, query = sample % points, sample // points // heads % queries
            weight_at = batch * weight_batch + query * weight_query + head * weight_head + k
            share = tl.load(weights + weight_at, mask=i < end, other=0.0).to(tl.float32)
            if not DISCRETE:
                at = batch * location_batch + query * location_query + head * location_head + 2 * k
                x, y, _ = read_position(locations, at, i < end, width, height, DISCRETE)
                share *= tl.maximum(1.0 - tl.abs(x - column), 0.0) * tl.maximum(1.0 - tl.abs(y - line), 0.0)
            g_at = batch * g_batch + query * g_query + head * features
            mask = (i < end)[:, None] & (c < features)[None, :]
            d = tl.load(g + g_at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            acc += share[:, None] * d
    tl.store(dvalue + owned * features + c, tl.sum(acc, 0).to(dvalue.dtype.element_ty), mask=c < features)


# --- launches ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _tables(
    shapes: tuple[int, ...], levels: tuple[int, ...], points: tuple[int, ...], discrete: bool, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """The level of every point; first row in its source, width, height and first cell of every level; a head's cells.

    Cells are the squares between four pixels, those around the map's edge included; pixels if discrete.
    """
    rows: list[int] = []
    cells, level, border = 0, 0, 0 if discrete else 1
    for count in levels:
        first = 0
        for _ in range(count):
            height, width = shapes[2 * level : 2 * level + 2]
            rows += (first, width, height, cells)
            first += height * width
            cells += (height + border) * (width + border) if height * width > 0 else 0
            level += 1
    of_points = [level for level, count in enumerate(points) for _ in range(count)]
    made = (torch.tensor(x, dtype=torch.int32, device=device) for x in (of_points, rows))
    return next(made), next(made), cells


class _Call:
    """What the launches have in common."""

    def __init__(
        self,
        values: Sequence[Tensor],
        locations: Tensor,
        weights: Tensor,
        presence: Tensor | None,
        shapes: Sequence[int],
        levels: Sequence[int],
        points: Sequence[int],
        discrete: bool,
    ) -> None:
        tables = tuple(shapes), tuple(levels), tuple(points)
        self.level_of, self.levels, self.cells = _tables(*tables, discrete, weights.device)
        self.values = tuple(values)
        self.locations, self.weights = _dense_behind_heads(locations, 2), _dense_behind_heads(weights, 1)
        self.presence = presence
        self.presence_strides = (0, 0)
        if presence is not None:
            self.presence_strides = (presence.stride(0) if presence.dim() == 2 else 0, presence.stride(-1))
        self.batch, self.queries, self.heads, self.points = weights.shape
        self.rows, self.features = self.batch * self.queries * self.heads, values[0].shape[3]
        self.level_counts, self.discrete = levels, discrete
        self.ends, level = [0], 0  # of the sources' points
        for count in levels:
            level += count
            self.ends.append(sum(points[:level]))
        self.location_strides, self.weight_strides = self.locations.stride()[:3], self.weights.stride()[:3]

    def presence_of(self, source: int) -> Tensor | None:
        return None if self.presence is None else self.presence[..., source:]


def _dense_behind_heads(t: Tensor, last: int) -> Tensor:
    return t if t.stride(3) == last and (last == 1 or t.stride(4) == 1) else t.contiguous()


def _row_config(features: int) -> Config:
    """512 elements of 64 threads: eight of each, 16 bytes of a half-precision row."""
    block = min(max(next_power_of_2(features), 16), 256)
    return Config({"ROWS": 512 // block, "BLOCK": block}, num_warps=2, num_stages=2)


def _owner_config(features: int) -> Config:
    """As many samples at a time as lie around a pixel where there are a few per pixel; one warp, for there are many."""
    block = min(max(next_power_of_2(features), 16), 128)
    return Config({"SAMPLES": min(1024 // block, 16), "BLOCK": block}, num_warps=max(block // 32, 1), num_stages=2)


def forward(a: Arguments, training: bool) -> Tensor:
    values, locations, weights, presence, shapes, levels, points, discrete = a
    call = _Call(values, locations, weights, presence, shapes, levels, points, discrete)
    out = weights.new_empty((call.batch, call.queries, call.heads * call.features))
    config = _row_config(call.features)
    size = ceil_div(call.rows, config.constants["ROWS"]) * ceil_div(call.features, config.constants["BLOCK"])
    launch(
        _forward,
        (size,),
        *(call.values, call.locations, call.weights, call.presence, call.level_of, call.levels, out),
        *(odd(call.ends[1:]), call.rows, call.queries, call.heads, call.features),
        *(tuple(v.stride(dim) for v in call.values) for dim in range(3)),
        *(*call.location_strides, *call.weight_strides, *call.presence_strides),
        DISCRETE=discrete,
        config=config,
    )
    return out


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    values, locations, weights, presence, shapes, levels, points, discrete = a
    (g,) = grads
    call = _Call(values, locations, weights, presence, shapes, levels, points, discrete)
    of_values, (of_locations, of_weights) = needed[: len(values)], needed[len(values) : len(values) + 2]
    dvalues = [v.new_empty(v.shape if n else 0) for v, n in zip(values, of_values, strict=True)]
    dlocations = locations.new_empty(locations.shape) if of_locations else None
    dweights = weights.new_empty(weights.shape) if of_weights else None
    if dlocations is not None or dweights is not None:
        _multiply(call, g, dlocations, dweights)
    if any(of_values):
        _scatter(call, g, dvalues, of_values)
    empty = weights.new_empty(0)
    return [*dvalues, *(empty if t is None else t for t in (dlocations, dweights)), empty]


def _multiply(call: _Call, g: Tensor, dlocations: Tensor | None, dweights: Tensor | None) -> None:
    config = _row_config(call.features)
    for source, value in enumerate(call.values):
        launch(
            _sample_gradients,
            (ceil_div(call.rows, config.constants["ROWS"]),),
            *(g, value, call.locations, call.weights, call.presence_of(source), call.level_of, call.levels),
            *(dlocations, dweights, *call.ends[source : source + 2]),
            *(call.rows, call.queries, call.heads, call.features, call.points, *g.stride()[:2]),
            *(*value.stride()[:3], *call.location_strides, *call.weight_strides, call.presence_strides[0]),
            DISCRETE=call.discrete,
            config=config,
        )


def _scatter(call: _Call, g: Tensor, dvalues: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    samples, nowhere = call.rows * call.points, call.batch * call.heads * call.cells
    names = call.weights.new_empty(samples, dtype=torch.int32 if nowhere < 2**31 - 1 else torch.int64)
    block = Config({"BLOCK": 512}, num_warps=4, num_stages=1)
    launch(
        _cells,
        (ceil_div(samples, 512),),
        *(call.locations, call.level_of, call.levels, names),
        *(samples, call.queries, call.heads, call.points, call.cells, nowhere, *call.location_strides),
        DISCRETE=call.discrete,
        config=block,
    )
    by_cell = names.sort(stable=True)
    each = torch.arange(nowhere + 1, dtype=names.dtype, device=names.device)
    starts = torch.searchsorted(by_cell.values, each, out_int32=samples < 2**31)
    config = _owner_config(call.features)
    level = 0
    for source, (dvalue, needed) in enumerate(zip(dvalues, wanted, strict=True)):
        end = level + call.level_counts[source]
        if needed:
            launch(
                _value_gradient,
                (call.batch * dvalue.shape[1] * call.heads * ceil_div(call.features, config.constants["BLOCK"]),),
                *(g, call.locations, call.weights, call.presence_of(source)),
                *(call.level_of, call.levels, by_cell.indices, starts, dvalue),
                *(call.queries, dvalue.shape[1], call.heads, call.features, call.points, level, end, call.cells),
                *(*g.stride()[:2], *call.location_strides, *call.weight_strides, call.presence_strides[0]),
                DISCRETE=call.discrete,
                config=config,
            )
        level = end


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Levels of a pyramid, sources that may be absent, wide heads, nearest pixels."""
    import mmkernels as mmk

    def call(
        batch: int, queries: int, heads: int, width: int, shapes: Sequence[Sequence[int]], points: int, **options: Any
    ) -> Any:
        size = (batch, queries, heads, len(shapes), points)
        value: Any = [new(batch, h * w, heads, width) for h, w in shapes]
        if "presence" not in options:
            value = new(batch, sum(h * w for h, w in shapes), heads, width)
        return mmk.deformable_attention(value, shapes, new(*size, 2), new(*size), **options)

    pyramid = ((64, 64), (32, 32), (16, 16), (8, 8))
    yield "5440 queries of 8x32", lambda: call(1, 5440, 8, 32, pyramid, 4)
    yield (
        "2 sources that may be absent",
        lambda: call(2, 900, 8, 32, ((58, 100), (40, 40)), 8, presence=new(2, 2, dtype=torch.bool)),
    )
    yield "300 queries of 4x80, discrete", lambda: call(2, 300, 4, 80, pyramid[:3], 4, method="discrete")
    yield "900 queries of 2x513", lambda: call(1, 900, 2, 513, pyramid[:2], 4)
