"""bilinear_fusion on GPUs.

    z_n = Σ_{j < rank} P_{n·rank + j} Q_{n·rank + j},   P = x Uᵀ,   Q = y Vᵀ

Tiling     Forward: a program owns rows and outputs and walks over the rank. P and Q of each step meet in registers;
           they are written, [rank·N, B], for a gradient alone. Backward: dP = dz Q and dQ = dz P in one pass over
           these; the four products from there are plain ones of matrices in memory, and torch's.
Precision  sums in float32; dP and dQ rounded to the inputs' dtype, as plain code rounds them.
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
from mmkernels.ops.bilinear_fusion.op import Arguments
from mmkernels.ops.concat_linear.reference import where_present
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, tiles


@triton.jit
def _projection(
    x,  # [B, K]
    x_stride,
    weight,  # [rank·N, K]
    weight_stride,
    width,  # K
    row,  # [M]
    c,  # [N], projections
    row_inside,
    c_inside,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    acc = tl.zeros([row.shape[0], c.shape[0]], tl.float32)
    x_row = x + row.to(tl.int64)[:, None] * x_stride
    weight_row = weight + c.to(tl.int64)[:, None] * weight_stride
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x_row + k, mask=row_inside[:, None] & (k < width), other=0.0)
        w = tl.load(weight_row + k, mask=c_inside[:, None] & (k < width), other=0.0)
        acc += tl.dot(a, tl.trans(w), input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x,  # [B, Kx]
    y,  # [B, Ky]
    x_weight,  # [rank·N, Kx]
    y_weight,  # [rank·N, Ky]
    z,  # [B, N]
    x_projection,  # [rank·N, B] or None
    y_projection,
    rows,  # B
    features,  # N
    rank,
    x_width,
    y_width,
    x_stride,
    y_stride,
    x_weight_stride,
    y_weight_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, n_inside = row < rows, n < features
    inside = row_inside[:, None] & n_inside[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for j in range(0, rank):
        c = n * rank + j
        p = _projection(
            x, x_stride, x_weight, x_weight_stride, x_width, row, c, row_inside, n_inside, BLOCK_K, PRECISION
        )
        q = _projection(
            y, y_stride, y_weight, y_weight_stride, y_width, row, c, row_inside, n_inside, BLOCK_K, PRECISION
        )
        acc += p * q
        if x_projection is not None:
            at = c.to(tl.int64)[None, :] * rows + row[:, None]
            tl.store(x_projection + at, p.to(x_projection.dtype.element_ty), mask=inside)
            tl.store(y_projection + at, q.to(y_projection.dtype.element_ty), mask=inside)
    at = row.to(tl.int64)[:, None] * features + n[None, :]
    tl.store(z + at, acc.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(g, projection, gradient, at, inside):
    """gradient = g · projection at these elements."""
    p = tl.load(projection + at, mask=inside).to(tl.float32)
    tl.store(gradient + at, (g * p).to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "count"])
def _projection_gradients(
    dz,  # [B, N]
    x_projection,  # [rank·N, B]
    y_projection,
    dx_projection,  # [rank·N, B] or None
    dy_projection,
    rows,  # B
    count,  # rank·N·B
    rank,
    dz_stride,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(dz + at % rows * dz_stride + at // rows // rank, mask=inside, other=0.0).to(tl.float32)
    if begin + BLOCK <= count:  # whole blocks have no mask to narrow their accesses
        if dx_projection is not None:
            _multiply(g, y_projection, dx_projection, at, None)
        if dy_projection is not None:
            _multiply(g, x_projection, dy_projection, at, None)
    else:
        if dx_projection is not None:
            _multiply(g, y_projection, dx_projection, at, inside)
        if dy_projection is not None:
            _multiply(g, x_projection, dy_projection, at, inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def _config(x: Tensor, rows: int) -> Config:
    """64 x 64 tiles of three sums among eight warps, a quarter of the rows where there are few; float32 takes half of
    rows and steps."""
    few, single = rows <= 64, x.dtype == torch.float32
    sizes = {"BLOCK_M": 16 if few else 32 if single else 64, "BLOCK_N": 64, "BLOCK_K": 32 if single else 64}
    return Config(sizes, num_warps=4 if few else 8, num_stages=3)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y, x_weight, y_weight, rank, presence = a
    x, y = where_present((x, y), presence)
    rows, features = x.shape[0], x_weight.shape[0] // rank
    z = x.new_empty((rows, features))
    p, q = (x.new_empty((x_weight.shape[0], rows) if training else 0) for _ in range(2))
    config = _config(x, rows)
    launch(
        _forward,
        (tiles(config, rows, features),),
        *(x, y, x_weight, y_weight, z, *((p, q) if training else (None, None))),
        *(rows, features, rank, x.shape[1], y.shape[1]),
        *(t.stride(0) for t in (x, y, x_weight, y_weight)),
        PRECISION=dot_precision(x),
        config=config,
    )
    return z, p, q


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x, y, x_weight, y_weight, rank, presence = a
    (dz,) = grads
    x, y = where_present((x, y), presence)
    p, q = saved
    of_x, of_y, of_x_weight, of_y_weight, _ = needed
    dp = torch.empty_like(p) if of_x or of_x_weight else None
    dq = torch.empty_like(q) if of_y or of_y_weight else None
    count, block = p.numel(), 2048  # 16 bytes of half precision for each of AMD's threads
    launch(
        _projection_gradients,
        (ceil_div(count, block) if dp is not None or dq is not None else 0,),
        *(dz, p, q, dp, dq),
        *(x.shape[0], count, rank, dz.stride(0)),
        config=Config({"BLOCK": block}),
    )

    def pulled(d: Tensor | None, factor: Tensor, transposed: bool, wanted: bool) -> Tensor:
        return torch.mm(d.T if transposed else d, factor) if wanted and d is not None else dz.new_empty(0)

    dxs = [pulled(dp, x_weight, True, of_x), pulled(dq, y_weight, True, of_y)]
    return [
        *gradients_where_present(dxs, presence, (of_x, of_y)),
        pulled(dp, x, False, of_x_weight),
        pulled(dq, y, False, of_y_weight),
        dz.new_empty(0),
    ]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above."""
    import mmkernels as mmk

    def call(rows: int, x_width: int, y_width: int, features: int, rank: int) -> Any:
        weights = new(rank * features, x_width), new(rank * features, y_width)
        return mmk.bilinear_fusion(new(rows, x_width), new(rows, y_width), *weights, rank=rank)

    yield "256x(2048, 1024) to 512, rank 5", lambda: call(256, 2048, 1024, 512, 5)
    yield "32x(304, 80) to 64, rank 4", lambda: call(32, 304, 80, 64, 4)
