"""concat_tokens on GPUs.

    out[b, start_i + l] = x̂ · w + bias,   x̂ the norm of z = x_i[b, l] + type[i] + position_i[l]     (no norm: x̂ = z)

Tiling     a program owns a run of positions of one source and a share of the batch, positions outside, so that type +
           position is formed once for a position's rows; ROWS positions at a time are in registers, and each row is
           read once and written once. The backward adds up dz over its share of the batch for every position, and the
           gradients of type, w and bias over all its rows; torch adds up what the programs have, in their order.
Precision  float32 from the rows read; a copy where nothing is done to them.
Limits     C up to 4096, what the registers of one program hold, and 32 sources.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.concat_tokens.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, odd
from mmkernels.triton.math import number, pick
from mmkernels.triton.norm import norm_gradient, normalized, row_config

_LENGTHS = ["batch", "total", "run", "share"]


@triton.jit
def _source(lengths, run):
    """Which source this program's positions are of, that source's first position in the sequence, and in it the
    program's first one."""
    source = 0
    start = 0
    begin = tl.program_id(0) * run
    sequence = 0
    programs = 0
    for i in tl.static_range(len(lengths)):
        here = tl.program_id(0) >= programs
        source = tl.where(here, i, source)
        start = tl.where(here, sequence, start)
        begin = tl.where(here, (tl.program_id(0) - programs) * run, begin)
        sequence += number(lengths[i])
        programs += tl.cdiv(number(lengths[i]), run)
    return source, start, begin


@triton.jit
def _embedding(type_ptr, position_ptr, column, inside, TYPED: tl.constexpr, POSITIONED: tl.constexpr):
    """type + position, of those there are; one of them is."""
    if TYPED:
        embedding = tl.load(type_ptr, mask=column, other=0.0).to(tl.float32)
        if POSITIONED:
            embedding += tl.load(position_ptr, mask=inside, other=0.0).to(tl.float32)
    else:
        embedding = tl.load(position_ptr, mask=inside, other=0.0).to(tl.float32)
    return embedding


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    x_ptrs,  # M of [B, L_i, C]
    position_ptrs,  # M of [L_i, C], or anything where not positioned
    type_ptr,  # [M, C], or anything where not TYPED
    weight_ptr,  # [C] or None
    bias_ptr,
    out_ptr,  # [B, ΣL, C], contiguous
    lengths,  # L_i, odd
    x_batches,  # strides
    x_tokens,
    position_tokens,
    type_source,
    positioned,  # 1 of the sources with a position embedding, else 0, odd
    batch,  # B
    total,  # ΣL
    features,  # C
    run,  # positions of a program, a multiple of ROWS
    share,  # batch elements of a program
    eps,
    NORM: tl.constexpr,
    TYPED: tl.constexpr,
    POSITIONED: tl.constexpr,  # whether any source has a position embedding
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # features in registers, a power of two
):
    c = tl.arange(0, BLOCK)[None, :]
    column = c < features
    source, start, begin = _source(lengths, run)
    length = number(pick(lengths, source))
    x_ptr = pick(x_ptrs, source) + c
    x_batch = pick(x_batches, source)
    x_token = pick(x_tokens, source)
    position_ptr = pick(position_ptrs, source) + c
    position_token = pick(position_tokens, source)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=column, other=0.0).to(tl.float32)
    b_first = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + run, length), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < length) & column
        x_at = x_ptr + row * x_token
        out_at = out_ptr + (start + row) * features + c
        if TYPED or POSITIONED:
            position_at = position_ptr + row * position_token
            known = inside & (number(pick(positioned, source)) == 1)
            embedding = _embedding(type_ptr + source * type_source + c, position_at, column, known, TYPED, POSITIONED)
        for b in range(b_first, tl.minimum(b_first + share, batch)):
            element = tl.cast(b, tl.int64)
            y = tl.load(x_at + element * x_batch, mask=inside, other=0.0).to(tl.float32)
            if TYPED or POSITIONED:
                y += embedding
            y, _ = normalized(y, inside, features, eps, NORM)
            if weight_ptr is not None:
                y *= weight
            if bias_ptr is not None:
                y += bias
            tl.store(out_at + element * total * features, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    g_ptr,  # [B, ΣL, C]
    x_ptrs,  # M of [B, L_i, C]
    position_ptrs,  # M of [L_i, C], or anything where not positioned
    type_ptr,  # [M, C], or anything where not TYPED
    weight_ptr,  # [C] or None
    dx_ptrs,  # M of [B, L_i, C], contiguous as all gradients, or anything where not wanted
    dposition_ptr,  # [shares, ΣL, C] float32 or None
    dtype_ptr,  # [shares, programs of a share, C] float32 or None
    dweight_ptr,
    dbias_ptr,
    lengths,
    g_batch,
    g_token,
    x_batches,
    x_tokens,
    position_tokens,
    type_source,
    positioned,
    wanted,  # 1 of the sources whose gradient is wanted, else 0, odd
    batch,
    total,
    features,
    run,
    share,
    eps,
    NORM: tl.constexpr,
    TYPED: tl.constexpr,
    POSITIONED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.arange(0, BLOCK)[None, :]
    column = c < features
    source, start, begin = _source(lengths, run)
    length = number(pick(lengths, source))
    x_ptr = pick(x_ptrs, source) + c
    x_batch = pick(x_batches, source)
    x_token = pick(x_tokens, source)
    position_ptr = pick(position_ptrs, source) + c
    position_token = pick(position_tokens, source)
    dtype = tl.zeros([ROWS, BLOCK], tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    b_first = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + run, length), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < length) & column
        g_at = g_ptr + (start + row) * g_token + c
        x_at = x_ptr + row * x_token
        dx_at = pick(dx_ptrs, source) + row * features + c
        written = inside & (number(pick(wanted, source)) == 1)
        if TYPED or POSITIONED:
            position_at = position_ptr + row * position_token
            known = inside & (number(pick(positioned, source)) == 1)
            embedding = _embedding(type_ptr + source * type_source + c, position_at, column, known, TYPED, POSITIONED)
        dposition = tl.zeros([ROWS, BLOCK], tl.float32)
        for b in range(b_first, tl.minimum(b_first + share, batch)):
            element = tl.cast(b, tl.int64)
            dz = tl.load(g_at + element * g_batch, mask=inside, other=0.0).to(tl.float32)
            if NORM is not None:
                x = tl.load(x_at + element * x_batch, mask=inside, other=0.0).to(tl.float32)
                if TYPED or POSITIONED:
                    x += embedding
                x, rstd = normalized(x, inside, features, eps, NORM)
                dweight += dz * x
                dbias += dz
                if weight_ptr is not None:
                    dz *= tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
                dz = norm_gradient(dz, x, rstd, features, NORM)
            tl.store(dx_at + element * length * features, dz.to(dx_at.dtype.element_ty), mask=written)
            dposition += dz
        if dposition_ptr is not None:
            there = (tl.program_id(1).to(tl.int64) * total + start + row) * features + c
            tl.store(dposition_ptr + there, dposition, mask=inside)
        dtype += dposition
    there = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * features + c
    if dtype_ptr is not None:
        tl.store(dtype_ptr + there, tl.sum(dtype, 0, keep_dims=True), mask=column)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + there, tl.sum(dweight, 0, keep_dims=True), mask=column)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + there, tl.sum(dbias, 0, keep_dims=True), mask=column)


def _split(xs: Sequence[Tensor], config: Config, least: int) -> tuple[int, int, list[int], int]:
    """Positions and batch elements per program, programs of every source, and shares of the batch.

    Enough programs to fill a GPU twice; of the batch not less than ``least``, and all of it before a second tile of
    positions.
    """
    batch, rows = max(xs[0].shape[0], 1), config.constants["ROWS"]
    each = ceil_div(batch * sum(ceil_div(x.shape[1], rows) for x in xs), 2048)
    share = min(max(each, least), batch)
    run = max(each // share, 1) * rows
    return run, share, [ceil_div(x.shape[1], run) for x in xs], ceil_div(xs[0].shape[0], share)


def _sources(
    xs: Sequence[Tensor],
    type_embedding: Tensor | None,
    position_embeddings: Sequence[Tensor],
    position_sources: Sequence[int],
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Sources and embeddings as the kernels take them: tensors, x for the embeddings that are not there; strides and
    which sources have a position embedding; constants."""
    of = dict(zip(position_sources, position_embeddings, strict=True))
    positions = tuple(of.get(i, x) for i, x in enumerate(xs))
    types = xs[0] if type_embedding is None else type_embedding
    strides = (
        tuple(x.stride(0) for x in xs),
        tuple(x.stride(1) for x in xs),
        tuple(p.stride(-2) for p in positions),
        types.stride(0),
    )
    constants = {"TYPED": type_embedding is not None, "POSITIONED": bool(of)}
    return (tuple(xs), positions, types), (*strides, odd([i in of for i in range(len(xs))])), constants


def _config(xs: Sequence[Tensor]) -> Config:
    return row_config(xs[0].shape[2], max(x.shape[1] for x in xs))


def forward(a: Arguments, training: bool) -> Tensor:
    xs, type_embedding, position_embeddings, position_sources, norm, norm_weight, norm_bias, eps, out_dtype = a
    batch, _, features = xs[0].shape
    lengths = [x.shape[1] for x in xs]
    out = xs[0].new_empty((batch, sum(lengths), features), dtype=out_dtype)
    config = _config(xs)
    run, share, programs, shares = _split(xs, config, 1)
    tensors, strides, constants = _sources(xs, type_embedding, position_embeddings, position_sources)
    launch(
        _forward,
        (sum(programs), shares if features else 0),
        *(*tensors, norm_weight, norm_bias, out, odd(lengths), *strides),
        *(batch, sum(lengths), features, run, share, eps),
        NORM=norm,
        **constants,
        config=config,
    )
    return out


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, type_embedding, position_embeddings, position_sources, norm, norm_weight, _, eps, _ = a
    (g,) = grads
    batch, total, features = g.shape
    lengths = [x.shape[1] for x in xs]
    needs_x, needs_rest = needed[: len(xs)], needed[len(xs) :]
    needs_type, *needs_position, needs_weight, needs_bias = needs_rest
    config = _config(xs)
    run, share, programs, shares = _split(xs, config, 4 if position_embeddings else 1)
    tensors, strides, constants = _sources(xs, type_embedding, position_embeddings, position_sources)
    dxs = [x.new_empty(x.shape) if n else None for x, n in zip(xs, needs_x, strict=True)]
    written = tuple(x if dx is None else dx for x, dx in zip(xs, dxs, strict=True))

    def sums(wanted: bool, rows: int) -> Tensor | None:
        return g.new_empty((shares, rows, features), dtype=torch.float32) if wanted else None

    dposition = sums(any(needs_position), total)
    dtype, dweight, dbias = (sums(n, sum(programs)) for n in (needs_type, needs_weight, needs_bias))
    launch(
        _backward,
        (sum(programs), shares if features else 0),
        *(g, *tensors, norm_weight, written, dposition, dtype, dweight, dbias),
        *(odd(lengths), *g.stride()[:2], *strides),
        *(odd(needs_x), batch, total, features, run, share, eps),
        NORM=norm,
        **constants,
        config=config,
        enable_fp_fusion=False,
    )
    of_types = None if dtype is None else torch.stack([p.sum((0, 1)) for p in dtype.split(programs, 1)])
    of_positions = [None] * len(lengths) if dposition is None else [p.sum(0) for p in dposition.split(lengths, 1)]
    found = [
        *(*dxs, of_types),
        *(of_positions[i] if n else None for i, n in zip(position_sources, needs_position, strict=True)),
        *(None if t is None else t.sum((0, 1)) for t in (dweight, dbias)),
    ]
    return [g.new_empty(0) if t is None else t.to(xs[0].dtype) for t in found]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows one by one and several at a time, and the widest."""
    import mmkernels as mmk

    def call(batch: int, features: int) -> Any:
        return mmk.concat_tokens(
            [new(batch, length, features) for length in (40, 200, 25)],
            type_embedding=new(3, features),
            position_embeddings=[new(40, features), None, new(25, features)],
            norm="layer",
            norm_weight=new(features),
            norm_bias=new(features),
        )

    for batch, features in ((64, 768), (64, 64), (1, 4096)):
        yield f"{batch}x(40+200+25)x{features}", functools.partial(call, batch, features)
