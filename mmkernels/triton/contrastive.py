"""What the kernels of the contrastive losses share: tiles of scores, and the products of their slopes with features.

The slopes d, a loss's derivatives by its logits, are written for a strip of rows at a time, never for all of them; a
strip has as many rows as there are features, or more while it stays small. The gradients are Σ_j d_ij y_j and
Σ_i d_ij x_i, the second summed over the strips in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, target, tiles

# Float16 has no small numbers: slopes are kept larger by this, their sums made smaller again in float32.
_FLOAT16_GAIN = 4096.0


@triton.jit
def cosines(
    x,  # [rows, D]
    y,  # [columns, D]
    i,  # the rows of the tile
    j,  # its columns
    rows,
    columns,
    features,
    x_stride,
    y_stride,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_i · y_j, zero outside."""
    x_row = x + i.to(tl.int64)[:, None] * x_stride
    y_row = y + j.to(tl.int64)[:, None] * y_stride
    acc = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x_row + k, mask=(i < rows)[:, None] & (k < features), other=0.0)
        b = tl.load(y_row + k, mask=(j < columns)[:, None] & (k < features), other=0.0)
        acc += tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["inner", "outer"])
def _slope_product(
    slopes,  # [outer, inner], or transposed
    y,  # [inner, D]
    factor,  # 0-d float32
    sums,  # [outer, D] float32, to begin with or None
    out,  # [outer, D]; its own sums where others are to come
    outer,
    inner,
    features,
    slope_stride,
    y_stride,
    TRANSPOSED: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """factor · Σ_k slopes[:, k] y_k; without LAST the sums alone."""
    columns = tl.cdiv(features, BLOCK_N)
    m = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            at = k.to(tl.int64)[:, None] * slope_stride + m[None, :]
            s = tl.trans(tl.load(slopes + at, mask=(k < inner)[:, None] & (m < outer)[None, :], other=0.0))
        else:
            at = m.to(tl.int64)[:, None] * slope_stride + k[None, :]
            s = tl.load(slopes + at, mask=(m < outer)[:, None] & (k < inner)[None, :], other=0.0)
        y_at = k.to(tl.int64)[:, None] * y_stride + d[None, :]
        f = tl.load(y + y_at, mask=(k < inner)[:, None] & (d < features)[None, :], other=0.0)
        acc += tl.dot(s, f, input_precision=PRECISION)
    inside = (m < outer)[:, None] & (d < features)[None, :]
    at = m.to(tl.int64)[:, None] * features + d[None, :]
    if sums is not None:
        acc += tl.load(sums + at, mask=inside, other=0.0)
    if LAST:
        acc *= tl.load(factor)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------

_TILES = 132  # one for each multiprocessor of a large GPU


def config(x: Tensor, rows: int, columns: int, sums: bool = False) -> Config:
    """Tiles of 128 rows where there are enough of them, else 64 x 64; float32 takes three products and less of
    everything. 64 deep from Hopper on, where 32 take half as long again. Ampere's registers would spill, as all would
    with sums over 128 columns of a tile."""
    if x.dtype == torch.float32:
        return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2)
    machine = target(x)
    ampere = machine.backend == "cuda" and machine.arch < 90
    width = 64 if sums else 128
    if ceil_div(rows, 128) * ceil_div(columns, width) >= _TILES and not (ampere and sums):
        deep = machine.backend == "cuda" and not ampere
        return Config({"BLOCK_M": 128, "BLOCK_N": width, "BLOCK_K": 64 if deep else 32}, 8, 3)
    return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 8 if sums else 4, 3)


def strips(rows: int, columns: int, features: int, pairs: int) -> Iterator[slice]:
    """Rows of about so many pairs, in whole tiles; at least as many as there are features."""
    step = max(ceil_div(max(pairs // max(columns, 1), features), 128) * 128, 128)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


SLOPE_PAIRS = 1 << 25  # of a strip: 64 MB in half precision


def slope_stride(columns: int) -> int:
    """From row to row of slopes, whose accesses are wide and whose kernels the same for any number of columns."""
    return ceil_div(columns, 64) * 64


def gain(x: Tensor) -> float:
    """What slopes are multiplied by before they are rounded."""
    return _FLOAT16_GAIN if x.dtype == torch.float16 else 1.0


class Gradients:
    """dx and dy out of strips of slopes, each where it is needed."""

    def __init__(self, x: Tensor, y: Tensor, factor: Tensor, needed: tuple[bool, bool], dtype: torch.dtype) -> None:
        """``factor``: 0-d float32, of the slopes as they are, without their gain; ``dtype``: of the gradients."""
        self._x, self._y = x, y
        self._factor = factor / gain(x)
        self.dx = x.new_empty(x.shape, dtype=dtype) if needed[0] else None
        fresh = y.new_empty if x.shape[0] else y.new_zeros  # without rows no strip writes it
        self.dy = fresh(y.shape, dtype=dtype) if needed[1] else None
        self._sums: Tensor | None = None

    @property
    def needed(self) -> bool:
        return self.dx is not None or self.dy is not None

    def add(self, strip: slice, slopes: Tensor) -> None:
        """Slopes [rows of the strip, columns], strip after strip."""
        if self.dx is not None:
            _multiply(slopes, self._y, self._factor, None, self.dx[strip], False, True)
        if self.dy is not None:
            last = strip.stop == self._x.shape[0]
            if not last and self._sums is None:
                self._sums = self.dy.new_zeros(self.dy.shape, dtype=torch.float32)
            into = self.dy if last or self._sums is None else self._sums
            _multiply(slopes, self._x[strip], self._factor, self._sums, into, True, last)


def _multiply(
    slopes: Tensor, y: Tensor, factor: Tensor, sums: Tensor | None, out: Tensor, transposed: bool, last: bool
) -> None:
    outer, features = out.shape
    chosen = config(y, outer, features, True)
    launch(
        _slope_product,
        (tiles(chosen, outer, features),),
        *(slopes, y, factor, sums, out, outer, y.shape[0], features, slopes.stride(0), y.stride(0)),
        TRANSPOSED=transposed,
        LAST=last,
        PRECISION=dot_precision(y),
        config=chosen,
    )
