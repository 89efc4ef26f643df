"""concat_norm_linear on GPUs.

    n = (c − mean) · rstd ∘ g + h,   c = [x₁; …; x_M]   (rms: mean = 0),   y = act(n Wᵀ + b)
    a = dz W,   dc = rstd · (a ∘ g − mean(a ∘ g) − x̂ · mean(a ∘ g ∘ x̂))   (rms: without mean(a ∘ g))

Tiling     Forward: a pass over the rows takes their statistics, walking twice over the sources, the second time from
           cache; then a program owns a tile of rows and features and walks over the sources, each against its columns
           of W, normalising x between its load and the product; bias, activation and cast happen on the tile. Backward:
           a pass over the rows takes the two means; one over tiles of each source then writes dx, the normalised rows
           and the sums over rows for dg and dh, which torch adds up in their order. a and dW are plain dense products,
           which torch's own (cuBLAS) serves as well as can be.
Precision  statistics and sums in float32, the variance from differences to the mean; n, dz and a rounded to the inputs'
           dtype.
Limits     none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._rows import as_rows
from mmkernels.ops.concat_linear.kernel_triton import _config, _dz
from mmkernels.ops.concat_norm_linear.op import Arguments
from mmkernels.triton.epilogue import finish
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, next_power_of_2, tiles


@triton.jit(do_not_specialize=["rows"])
def _statistics(
    xs,  # each [rows, K_i]
    x_strides,
    widths,  # K_i
    statistics,  # mean and rstd, [rows, 2] float32
    rows,
    width,  # K
    eps,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    mean = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer":
        total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for i in tl.static_range(len(xs)):
            for start in range(0, widths[i], BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)[None, :]
                x_at = xs[i] + row.to(tl.int64)[:, None] * x_strides[i] + k
                total += tl.load(x_at, mask=inside & (k < widths[i]), other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / width
    drift = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in tl.static_range(len(xs)):
        for start in range(0, widths[i], BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            x_at = xs[i] + row.to(tl.int64)[:, None] * x_strides[i] + k
            x = tl.load(x_at, mask=inside & (k < widths[i]), other=0.0).to(tl.float32)
            x = tl.where(k < widths[i], x - mean[:, None], 0.0)
            drift += x
            square += x * x
    variance = tl.sum(square, 1) / width
    if NORM == "layer":  # the mean was off by its rounding
        off = tl.sum(drift, 1) / width
        mean += off
        variance -= off * off
    tl.store(statistics + row.to(tl.int64) * 2, mean, mask=row < rows)
    tl.store(statistics + row.to(tl.int64) * 2 + 1, 1.0 / tl.sqrt(variance + eps), mask=row < rows)


@triton.jit
def _pair(numbers, row, rows):
    """Both numbers of each row of [rows, 2], as columns; 0 beyond the end."""
    at = numbers + row.to(tl.int64)[:, None] * 2
    inside = (row < rows)[:, None]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    xs,  # each [rows, K_i]
    x_strides,
    widths,  # K_i
    norm_weight,  # g, [K]
    norm_bias,  # h, [K] or None
    statistics,  # [rows, 2]
    weight,  # [N, K]
    bias,  # [N] or None
    preactivation,  # z, [rows, N], or None
    y,  # [rows, N]
    rows,
    features,  # N
    weight_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = (row < rows)[:, None]
    f_inside = f < features
    mean, rstd = _pair(statistics, row, rows)
    weight_row = weight + f.to(tl.int64)[:, None] * weight_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(xs)):
        x_row = xs[i] + row.to(tl.int64)[:, None] * x_strides[i]
        for start in range(0, widths[i], BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_row + k, mask=row_inside & (k < widths[i]), other=0.0)
            w = tl.load(weight_row + k, mask=f_inside[:, None] & (k < widths[i]), other=0.0)
            n = (x.to(tl.float32) - mean) * rstd
            n *= tl.load(norm_weight + k, mask=k < widths[i], other=0.0).to(tl.float32)
            if norm_bias is not None:
                n += tl.load(norm_bias + k, mask=k < widths[i], other=0.0).to(tl.float32)
            acc += tl.dot(n.to(x.dtype), tl.trans(w), input_precision=PRECISION)
        weight_row += widths[i]
        norm_weight += widths[i]
        if norm_bias is not None:
            norm_bias += widths[i]
    finish(acc, bias, None, None, preactivation, y, row, f, rows, features, 0, 0, features, ACTIVATION)


@triton.jit(do_not_specialize=["rows"])
def _gradient_means(
    xs,  # each [rows, K_i]
    x_strides,
    widths,  # K_i
    a,  # dz W, [rows, K]
    norm_weight,  # [K]
    statistics,  # [rows, 2]
    means,  # of a ∘ g (0 for rms) and of a ∘ g ∘ x̂, [rows, 2] float32
    rows,
    width,  # K
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mean, rstd = _pair(statistics, row, rows)
    a_row = a + row.to(tl.int64)[:, None] * width
    plain = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    along = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in tl.static_range(len(xs)):
        x_row = xs[i] + row.to(tl.int64)[:, None] * x_strides[i]
        for start in range(0, widths[i], BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            inside = (row < rows)[:, None] & (k < widths[i])
            x = tl.load(x_row + k, mask=inside, other=0.0).to(tl.float32)
            d = tl.load(a_row + k, mask=inside, other=0.0).to(tl.float32)
            d *= tl.load(norm_weight + k, mask=k < widths[i], other=0.0).to(tl.float32)
            plain += d
            along += d * ((x - mean) * rstd)
        a_row += widths[i]
        norm_weight += widths[i]
    at = means + row.to(tl.int64) * 2
    if NORM == "layer":
        tl.store(at, tl.sum(plain, 1) / width, mask=row < rows)
    else:
        tl.store(at, tl.zeros([BLOCK_M], tl.float32), mask=row < rows)
    tl.store(at + 1, tl.sum(along, 1) / width, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _source_gradients(
    x,  # [rows, K_i]
    a,  # [rows, K], from the source's first column on, as all that is K wide; or None
    norm_weight,  # [K]
    norm_bias,  # [K] or None
    statistics,  # [rows, 2]
    means,  # [rows, 2] or None
    dx,  # [rows, K_i] or None
    n,  # [rows, K] or None
    dnorm_weight,  # [row blocks, K] float32 or None
    dnorm_bias,  # [row blocks, K] float32 or None
    rows,
    width,  # K_i
    x_stride,
    stride,  # K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    block = tl.program_id(0) // columns
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (k < width)[None, :]
    mean, rstd = _pair(statistics, row, rows)
    x_at = row.to(tl.int64)[:, None] * x_stride + k[None, :]
    normed = (tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    g = tl.load(norm_weight + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * stride + k[None, :]
    if n is not None:
        scaled = normed * g
        if norm_bias is not None:
            scaled += tl.load(norm_bias + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        tl.store(n + at, scaled.to(n.dtype.element_ty), mask=inside)
    if a is not None:
        d = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
        if dx is not None:
            plain, along = _pair(means, row, rows)
            dx_at = row.to(tl.int64)[:, None] * width + k[None, :]
            tl.store(dx + dx_at, ((d * g - plain - normed * along) * rstd).to(dx.dtype.element_ty), mask=inside)
        sum_at = block.to(tl.int64) * stride + k
        if dnorm_weight is not None:
            tl.store(dnorm_weight + sum_at, tl.sum(d * normed, 0), mask=k < width)
        if dnorm_bias is not None:
            tl.store(dnorm_bias + sum_at, tl.sum(d, 0), mask=k < width)


# --- launches ---------------------------------------------------------------------------------------------------------


def _row_config(xs: Sequence[Tensor]) -> Config:
    """Sixteen elements per thread of every tile; blocks no wider than the sources."""
    block = min(next_power_of_2(max(x.shape[1] for x in xs)), 512)
    return Config({"BLOCK_M": 2048 // block, "BLOCK_K": block}, num_stages=1)


def _launch_rows(kernel: Any, xs: Sequence[Tensor], *args: Any, **constants: Any) -> None:
    """Run a kernel over whole rows of the sources, whose other tensors are ``args``; rows, K and numbers follow."""
    config = _row_config(xs)
    strides, widths = tuple(x.stride(0) for x in xs), tuple(x.shape[1] for x in xs)
    grid = (ceil_div(xs[0].shape[0], config.constants["BLOCK_M"]),)
    launch(kernel, grid, tuple(xs), strides, widths, *args, config=config, enable_fp_fusion=False, **constants)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    xs, norm_weight, norm_bias, weight, bias, norm, eps, activation = a
    features, width = weight.shape
    y = weight.new_empty((*xs[0].shape[:-1], features))
    keeps = training and activation is not None
    z = y.new_empty(y.shape if keeps else 0)
    sources = [as_rows(x) for x in xs]
    rows = sources[0].shape[0]
    statistics = y.new_empty((rows, 2), dtype=torch.float32)
    _launch_rows(_statistics, sources, statistics, rows, width, float(eps), NORM=norm)
    config = _config(weight, rows, features)
    launch(
        _forward,
        (tiles(config, rows, features),),
        *(tuple(sources), tuple(x.stride(0) for x in sources), tuple(x.shape[1] for x in sources)),
        *(norm_weight, norm_bias, statistics, weight, bias, z if keeps else None, y),
        *(rows, features, weight.stride(0)),
        ACTIVATION=activation,
        PRECISION=dot_precision(weight),
        config=config,
    )
    return y, z, statistics if training else statistics.new_empty(0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, norm_weight, norm_bias, weight, _, norm, _, activation = a
    count = len(xs)
    of_xs, (of_norm_weight, of_norm_bias, of_weight, of_bias) = needed[:count], needed[count:]
    *kept, statistics = saved  # kept: the output and nothing without an activation, else z
    wants_da = any(of_xs) or of_norm_weight or of_norm_bias
    z = None if activation is None else kept[0]
    dz, dbias, _ = _dz(as_rows(grads[0]), z, None, activation, False, wants_da or of_weight, of_bias, False)
    sources = [as_rows(x) for x in xs]
    rows, width = dz.shape[0], weight.shape[1]
    da = dz @ weight if wants_da else None
    means = statistics.new_empty((rows, 2)) if any(of_xs) else None
    if means is not None:
        _launch_rows(_gradient_means, sources, da, norm_weight, statistics, means, rows, width, NORM=norm)
    config = Config({"BLOCK_M": 32, "BLOCK_N": 64})
    blocks = ceil_div(rows, config.constants["BLOCK_M"])
    n = weight.new_empty((rows, width)) if of_weight else None
    dnorm_weight, dnorm_bias = (
        statistics.new_empty((blocks, width)) if wanted else None for wanted in (of_norm_weight, of_norm_bias)
    )
    dxs = [x.new_empty(x.shape) if of_x else None for x, of_x in zip(xs, of_xs, strict=True)]
    column = 0
    for x, dx in zip(sources, dxs, strict=True):
        columns = slice(column, column + x.shape[1])
        column = columns.stop
        given, written = (
            [None if t is None else t[..., columns] for t in tensors]
            for tensors in ((da, norm_weight, norm_bias), (n, dnorm_weight, dnorm_bias))
        )
        if any(t is not None for t in (dx, *written)):
            launch(
                _source_gradients,
                (tiles(config, *x.shape),),
                *(x, *given, statistics, means, dx, *written),
                *(rows, x.shape[1], x.stride(0), width),
                config=config,
            )
    dweight = None if n is None else dz.t() @ n
    sums = (None if t is None else t.sum(0).to(weight.dtype) for t in (dnorm_weight, dnorm_bias, dbias))
    dnorm_weight, dnorm_bias, dbias = sums
    return [weight.new_empty(0) if g is None else g for g in (*dxs, dnorm_weight, dnorm_bias, dweight, dbias)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above."""
    import mmkernels as mmk

    def call(rows: int, widths: Sequence[int], features: int, **options: Any) -> Any:
        xs, width = [new(rows, width) for width in widths], sum(widths)
        return mmk.concat_norm_linear(xs, new(width), new(width), new(features, width), new(features), **options)

    yield "16384x(1024, 1024, 768) to 1024, gelu", lambda: call(16384, (1024, 1024, 768), 1024, activation="gelu")
    yield "256x(768, 512) to 768, rms", lambda: call(256, (768, 512), 768, norm="rms")
    yield "16x(240, 80, 48) to 128, relu", lambda: call(16, (240, 80, 48), 128, activation="relu")
