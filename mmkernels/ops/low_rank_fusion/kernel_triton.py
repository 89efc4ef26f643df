"""low_rank_fusion on GPUs.

    y = Σ_r w_r Π_i P_i[r] + b,   P_i[r] = [1; x_i] F_i[r]

Tiling     Forward: a program owns rows and outputs and walks over the ranks; a rank's projections are formed one after
           the other and multiplied in registers. Backward: the projections of a rank are formed again and kept, as
           plain code keeps them; then dP_i[r] = w_r dy Π_{j≠i} P_j[r], and from these dx, a program owning rows and
           features of one modality over all ranks, and dF, a program owning features and outputs of one rank over all
           rows.
Precision  sums in float32; in the backward P and dP are rounded to the inputs' dtype, as plain code rounds them.
Limits     none.
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
from mmkernels.ops.low_rank_fusion.op import Arguments
from mmkernels.triton.launch import Config, dot_precision, launch, tiles


@triton.jit
def _projection(
    x,  # [B, D]
    stride,
    width,
    factor,  # [D + 1, N], of a rank
    row,  # [M]
    n,  # [N]
    rows,
    features,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[1; x] F of a tile, float32."""
    inside = n < features
    acc = tl.zeros([row.shape[0], n.shape[0]], tl.float32)
    acc += tl.load(factor + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = row.to(tl.int64)[:, None] * stride + k[None, :]
        a = tl.load(x + at, mask=(row < rows)[:, None] & (k < width)[None, :], other=0.0)
        f = tl.load(
            factor + (k + 1)[:, None] * features + n[None, :], mask=(k < width)[:, None] & inside[None, :], other=0.0
        )
        acc += tl.dot(a, f, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _forward(
    xs,  # each [B, D]
    strides,
    widths,  # D
    factors,  # each [R, D + 1, N]
    rank_weights,  # [R]
    bias,  # [N] or None
    y,  # [B, N]
    rows,
    features,
    ranks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, ranks):
        product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.load(rank_weights + r).to(tl.float32)
        for i in tl.static_range(len(xs)):
            factor = factors[i] + tl.cast(r, tl.int64) * (widths[i] + 1) * features
            product *= _projection(xs[i], strides[i], widths[i], factor, row, n, rows, features, BLOCK_K, PRECISION)
        acc += product
    if bias is not None:
        acc += tl.load(bias + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * features + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (n < features)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _projections(
    xs,
    strides,
    widths,
    factors,
    projections,  # each [R, B, N]
    rows,
    features,
    ranks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64)
    at = (r * rows + row[:, None]) * features + n[None, :]
    inside = (row < rows)[:, None] & (n < features)[None, :]
    for i in tl.static_range(len(xs)):
        factor = factors[i] + r * (widths[i] + 1) * features
        p = _projection(xs[i], strides[i], widths[i], factor, row, n, rows, features, BLOCK_K, PRECISION)
        tl.store(projections[i] + at, p.to(projections[i].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _projection_gradients(
    dy,  # [B, N]
    rank_weights,
    projections,  # each [R, B, N]
    gradients,  # each [R, B, N], or None
    products,  # [R, tiles], the sums of dy Π P over each tile, or None
    rows,
    features,
    dy_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64)
    at = (r * rows + row[:, None]) * features + n[None, :]
    inside = (row < rows)[:, None] & (n < features)[None, :]
    g = tl.load(dy + row.to(tl.int64)[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(rank_weights + r).to(tl.float32)
    for i in tl.static_range(len(projections)):
        if gradients[i] is not None:
            d = g * w
            for j in tl.static_range(len(projections)):
                if j != i:
                    d *= tl.load(projections[j] + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(gradients[i] + at, d.to(gradients[i].dtype.element_ty), mask=inside)
    if products is not None:
        for j in tl.static_range(len(projections)):
            g *= tl.load(projections[j] + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(products + r * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(g, 1), 0))


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(
    dp,  # [R, B, N]
    factor,  # [R, D + 1, N]
    dx,  # [B, D]
    rows,
    features,
    width,
    ranks,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(0, ranks):
        rank = tl.cast(r, tl.int64)
        for start in range(0, features, BLOCK_K):
            n = start + tl.arange(0, BLOCK_K)
            a_at = (rank * rows + row[:, None]) * features + n[None, :]
            a = tl.load(dp + a_at, mask=(row < rows)[:, None] & (n < features)[None, :], other=0.0)
            f_at = (rank * (width + 1) + 1 + d[:, None]) * features + n[None, :]
            f = tl.load(factor + f_at, mask=(d < width)[:, None] & (n < features)[None, :], other=0.0)
            acc += tl.dot(a, tl.trans(f), input_precision=PRECISION)
    at = row.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=(row < rows)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _factor_gradient(
    dp,  # [R, B, N]
    x,  # [B, D]
    dfactor,  # [R, D + 1, N]
    rows,
    features,
    width,
    x_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    k = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)  # of [1; x]
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        x_at = row.to(tl.int64)[:, None] * x_stride + (k - 1)[None, :]
        is_x = (k > 0)[None, :] & (k <= width)[None, :] & (row < rows)[:, None]
        a = tl.load(x + x_at, mask=is_x, other=0.0)
        a = tl.where((k == 0)[None, :], tl.full(a.shape, 1.0, tl.float32).to(a.dtype), a)
        p_at = (r * rows + row[:, None]) * features + n[None, :]
        p = tl.load(dp + p_at, mask=(row < rows)[:, None] & (n < features)[None, :], other=0.0)
        acc += tl.dot(tl.trans(a), p, input_precision=PRECISION)
    at = (r * (width + 1) + k[:, None]) * features + n[None, :]
    tl.store(dfactor + at, acc.to(dfactor.dtype.element_ty), mask=(k <= width)[:, None] & (n < features)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------


def _config(x: Tensor, rows: int) -> Config:
    """64 x 64 tiles, fewer rows where there are few; the registers of three tiles of sums and of the addresses are
    shared by eight warps. float32 takes half of rows and steps."""
    few, single = rows <= 64, x.dtype == torch.float32
    sizes = {"BLOCK_M": 16 if few else 32 if single else 64, "BLOCK_N": 64, "BLOCK_K": 32 if single else 64}
    return Config(sizes, num_warps=4 if few else 8, num_stages=3)


def _modalities(xs: Sequence[Tensor]) -> tuple[tuple[Any, ...], ...]:
    return tuple(xs), tuple(x.stride(0) for x in xs), tuple(x.shape[1] for x in xs)


def forward(a: Arguments, training: bool) -> Tensor:
    xs, factors, rank_weights, bias, presence = a
    xs = where_present(xs, presence)
    rows, (ranks, _, features) = xs[0].shape[0], factors[0].shape
    y = xs[0].new_empty((rows, features))
    config = _config(y, rows)
    launch(
        _forward,
        (tiles(config, rows, features),),
        *(*_modalities(xs), tuple(f.contiguous() for f in factors), rank_weights.contiguous(), bias, y),
        *(rows, features, ranks),
        PRECISION=dot_precision(y),
        config=config,
    )
    return y


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, factors, rank_weights, _, presence = a
    (dy,) = grads
    xs = where_present(xs, presence)
    count = len(xs)
    of_inputs, of_factors, (of_ranks, of_bias, _) = needed[:count], needed[count : 2 * count], needed[2 * count :]
    factors = [f.contiguous() for f in factors]
    wanted = [a or b for a, b in zip(of_inputs, of_factors, strict=True)]
    dps: Sequence[Tensor | None] = [None] * count
    dweights = dy.new_empty(0)
    if any(wanted) or of_ranks:
        dps, dweights = _projection_gradients_of(dy, xs, factors, rank_weights.contiguous(), wanted, of_ranks)
    dxs = [
        _input_gradient_of(p, x, f) if n and p is not None else dy.new_empty(0)
        for p, x, f, n in zip(dps, xs, factors, of_inputs, strict=True)
    ]
    dfactors = [
        _factor_gradient_of(p, x, f) if n and p is not None else dy.new_empty(0)
        for p, x, f, n in zip(dps, xs, factors, of_factors, strict=True)
    ]
    dxs = gradients_where_present(dxs, presence, of_inputs)
    return [*dxs, *dfactors, dweights, dy.sum(0) if of_bias else dy.new_empty(0), dy.new_empty(0)]


def _projection_gradients_of(
    dy: Tensor,
    xs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weights: Tensor,
    wanted: Sequence[bool],
    of_ranks: bool,
) -> tuple[list[Tensor | None], Tensor]:
    """dP of the modalities that are wanted, [R, B, N], and the gradient of the ranks' weights."""
    rows, (ranks, _, features) = xs[0].shape[0], factors[0].shape
    projections = tuple(dy.new_empty((ranks, rows, features)) for _ in xs)
    gradients = tuple(torch.empty_like(p) if w else None for p, w in zip(projections, wanted, strict=True))
    config = _config(dy, rows)
    count = tiles(config, rows, features)
    products = dy.new_empty((ranks, count), dtype=torch.float32) if of_ranks else None
    launch(
        _projections,
        (count, ranks),
        *(*_modalities(xs), tuple(factors), projections),
        *(rows, features, ranks),
        PRECISION=dot_precision(dy),
        config=config,
    )
    launch(
        _projection_gradients,
        (count, ranks),
        *(dy, rank_weights, projections, gradients, products),
        *(rows, features, dy.stride(0)),
        config=Config({name: config.constants[name] for name in ("BLOCK_M", "BLOCK_N")}),
    )
    return list(gradients), dy.new_empty(0) if products is None else products.sum(1).to(dy.dtype)


def _input_gradient_of(dp: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    (rows, width), (ranks, _, features) = x.shape, factor.shape
    dx = x.new_empty(x.shape)
    config = _config(x, rows)
    launch(
        _input_gradient,
        (tiles(config, rows, width),),
        *(dp, factor, dx),
        *(rows, features, width, ranks),
        PRECISION=dot_precision(x),
        config=config,
    )
    return dx


def _factor_gradient_of(dp: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    (rows, width), (ranks, _, features) = x.shape, factor.shape
    dfactor = factor.new_empty(factor.shape)
    config = _config(x, width + 1)
    launch(
        _factor_gradient,
        (tiles(config, width + 1, features), ranks),
        *(dp, x, dfactor),
        *(rows, features, width, x.stride(0)),
        PRECISION=dot_precision(x),
        config=config,
    )
    return dfactor


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above."""
    import mmkernels as mmk

    def call(rows: int, widths: Sequence[int], ranks: int, features: int) -> Any:
        factors = [new(ranks, width + 1, features) for width in widths]
        return mmk.low_rank_fusion([new(rows, w) for w in widths], factors, new(ranks), new(features))

    yield "1024x(768, 512) to 256, rank 4", lambda: call(1024, (768, 512), 4, 256)
    yield "32x(48, 32, 32) to 64, rank 4", lambda: call(32, (48, 32, 32), 4, 64)
