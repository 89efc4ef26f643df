"""concat_linear on GPUs.

    z = [x₁; …; x_M] Wᵀ + b,   y = residual + tanh(gate) · act(z)

Tiling     Forward: a program owns a tile of rows and features and walks over the sources, each against its columns of
           W; bias, activation, gate, residual and cast happen on the tile. Tiles of the same rows run together, so that
           these come from the second cache. Backward: dz and the sums over rows in one pass; dx of a source, a program
           owning rows and columns of it; dW, a program owning features and columns of a source and a share of the rows,
           which torch adds up in their order. A block of rows none of which has a source skips it. Where nothing is
           skipped, half-precision dx and dW are torch's products.
Precision  sums in float32; dz rounded to the inputs' dtype.
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
from mmkernels.ops.concat_linear.op import Arguments, keeps_output, needs_preactivation
from mmkernels.ops.concat_linear.tma_triton import forward_by_descriptors, pays
from mmkernels.triton.epilogue import finish
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, target, tiles
from mmkernels.triton.math import activation, activation_derivative, tanh


@triton.jit
def _present(presence, row_stride, row, rows):
    """Which rows have a source; all inside where there are no flags."""
    inside = row < rows
    if presence is not None:
        inside = inside & (tl.load(presence + row.to(tl.int64) * row_stride, mask=inside, other=0) != 0)
    return inside


@triton.jit(do_not_specialize=["rows"])
def _forward(
    xs,  # each [rows, K]
    x_strides,
    widths,  # K
    weight,  # [N, ΣK]
    bias,  # [N] or None
    presence,  # of each source [rows], or None
    residual,  # [rows, N] or None
    gate,  # [N] or [1], or None
    preactivation,  # z, [rows, N], or None
    y,  # [rows, N]
    rows,
    features,  # N
    weight_stride,
    presence_stride,
    residual_stride,
    gate_stride,  # 0 where one gate is for all features
    y_stride,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < features
    weight_row = weight + n.to(tl.int64)[:, None] * weight_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(xs)):
        here = _present(presence[i], presence_stride, row, rows)
        end = tl.where(tl.max(here.to(tl.int32), 0) > 0, widths[i], 0)
        x_row = xs[i] + row.to(tl.int64)[:, None] * x_strides[i]
        for start in range(0, end, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)[None, :]
            a = tl.load(x_row + k, mask=here[:, None] & (k < widths[i]), other=0.0)
            w = tl.load(weight_row + k, mask=n_inside[:, None] & (k < widths[i]), other=0.0)
            acc += tl.dot(a, tl.trans(w), input_precision=PRECISION)
        weight_row += widths[i]
    finish(
        acc, bias, residual, gate, preactivation, y, row, n, rows, features, residual_stride, gate_stride, y_stride,
        ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _preactivation_gradient(
    dy,  # [rows, N]
    kept,  # z, or the output where FROM_OUTPUT, or None
    gate,  # [N] or [1], or None
    dz,  # [rows, N] or None
    dbias,  # [row blocks, N] float32 or None
    dgate,  # [row blocks, N] float32 or None
    rows,
    features,
    dy_stride,
    gate_stride,
    ACTIVATION: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    block = tl.program_id(0) // columns
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (n < features)[None, :]
    at = row.to(tl.int64)[:, None] * features + n[None, :]
    g = tl.load(dy + row.to(tl.int64)[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    z = g * 0.0
    if kept is not None:
        z = tl.load(kept + at, mask=inside, other=0.0).to(tl.float32)
    if dgate is not None:
        t = tanh(tl.load(gate + n * gate_stride, mask=n < features, other=0.0).to(tl.float32))
        of_gate = tl.sum(g * activation(z, ACTIVATION), 0) * (1.0 - t * t)
        tl.store(dgate + block.to(tl.int64) * features + n, of_gate, mask=n < features)
    if gate is not None:
        g *= tanh(tl.load(gate + n * gate_stride, mask=n < features, other=0.0).to(tl.float32))[None, :]
    if FROM_OUTPUT:
        if ACTIVATION == "relu":
            g = tl.where(z > 0, g, g * 0.0)
        elif ACTIVATION == "tanh":
            g *= 1.0 - z * z
        else:
            g *= z * (1.0 - z)
    else:
        g *= activation_derivative(z, ACTIVATION)
    if dz is not None:
        tl.store(dz + at, g.to(dz.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + block.to(tl.int64) * features + n, tl.sum(g, 0), mask=n < features)


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(
    dz,  # [rows, N]
    weight,  # [N, ΣK], from the source's first column on
    presence,  # [rows] or None
    dx,  # [rows, K]
    rows,
    features,
    width,  # K
    dz_stride,
    weight_stride,
    presence_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    here = _present(presence, presence_stride, row, rows)
    end = tl.where(tl.max(here.to(tl.int32), 0) > 0, features, 0)
    dz_row = dz + row.to(tl.int64)[:, None] * dz_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, end, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        g = tl.load(dz_row + n[None, :], mask=here[:, None] & (n < features)[None, :], other=0.0)
        w_at = n.to(tl.int64)[:, None] * weight_stride + k[None, :]
        w = tl.load(weight + w_at, mask=(n < features)[:, None] & (k < width)[None, :], other=0.0)
        acc += tl.dot(g, w, input_precision=PRECISION)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    acc = tl.where(here[:, None], acc, 0.0)
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=(row < rows)[:, None] & (k < width)[None, :])


@triton.jit(do_not_specialize=["rows", "share"])
def _weight_gradient(
    dz,  # [rows, N]
    x,  # [rows, K]
    presence,  # [rows] or None
    dweight,  # [N, ΣK] from the source's first column on, or [shares, N, K] float32
    rows,
    features,
    width,
    share,  # rows of a program
    dz_stride,
    x_stride,
    presence_stride,
    dweight_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    n = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * share
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, tl.minimum(begin + share, rows), BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        here = _present(presence, presence_stride, row, rows)
        g_at = row.to(tl.int64)[:, None] * dz_stride + n[None, :]
        g = tl.load(dz + g_at, mask=here[:, None] & (n < features)[None, :], other=0.0)
        x_at = row.to(tl.int64)[:, None] * x_stride + k[None, :]
        a = tl.load(x + x_at, mask=here[:, None] & (k < width)[None, :], other=0.0)
        acc += tl.dot(tl.trans(g), a, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * features + n[:, None]) * dweight_stride + k[None, :]
    tl.store(dweight + at, acc.to(dweight.dtype.element_ty), mask=(n < features)[:, None] & (k < width)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------

_PROGRAMS = 264  # two for each multiprocessor of a large GPU


def _config(x: Tensor, rows: int, columns: int) -> Config:
    """128 x 128 tiles where there are enough of them, else 64 x 64, and 16 rows where there are few; float32 takes
    three products and less of everything. 64 deep from Hopper on, where 32 take half as long again; Ampere's registers
    would spill."""
    single = x.dtype == torch.float32
    if rows <= 16:
        return Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32 if single else 64}, 4, 3)
    if single:
        return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2)
    if ceil_div(rows, 128) * ceil_div(columns, 128) >= _PROGRAMS // 2:
        machine = target(x)
        deep = machine.backend == "cuda" and machine.arch >= 90
        return Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64 if deep else 32}, 8, 3)
    return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 4, 3)


def _flags(presence: Tensor | None, count: int) -> tuple[tuple[Tensor | None, ...], int]:
    """The flags of each source, and their stride from row to row."""
    if presence is None:
        return (None,) * count, 0
    flags = presence[None] if presence.dim() == 1 else presence.reshape(-1, count)
    return tuple(flags[:, i] for i in range(count)), 0 if presence.dim() == 1 else flags.stride(0)


def _gate_stride(gate: Tensor | None) -> int:
    return 0 if gate is None or gate.dim() == 0 else gate.stride(0)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    xs, weight, bias, activation, presence, residual, gate = a
    features = weight.shape[0]
    y = weight.new_empty((*xs[0].shape[:-1], features))
    keeps = training and needs_preactivation(a)
    z = y.new_empty(y.shape if keeps else 0)
    sources = [as_rows(x) for x in xs]
    rows = sources[0].shape[0]
    flags, flag_stride = _flags(presence, len(xs))
    flat_residual = None if residual is None else as_rows(residual)
    if presence is None and pays(sources, weight):
        kept = z if keeps else None
        forward_by_descriptors(sources, weight, bias, activation, flat_residual, gate, _gate_stride(gate), kept, y)
        return y, z
    config = _config(weight, rows, features)
    launch(
        _forward,
        (tiles(config, rows, features),),
        *(tuple(sources), tuple(x.stride(0) for x in sources), tuple(x.shape[1] for x in sources)),
        *(weight, bias, flags, flat_residual, gate, z if keeps else None, y),
        *(rows, features, weight.stride(0), flag_stride),
        *(0 if flat_residual is None else flat_residual.stride(0), _gate_stride(gate), features),
        ACTIVATION=activation,
        PRECISION=dot_precision(weight),
        config=config,
    )
    return y, z


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, weight, _, activation, presence, _, gate = a
    count = len(xs)
    of_xs, (of_weight, of_bias, _, of_residual, of_gate) = needed[:count], needed[count:]
    dy = as_rows(grads[0])
    kept = None
    if activation is not None or gate is not None:
        kept = saved[0]
    from_output = keeps_output(a)
    wants_dz = any(of_xs) or of_weight
    dz, dbias, dgate = _dz(dy, kept, gate, activation, from_output, wants_dz, of_bias, of_gate)
    flags, flag_stride = _flags(presence, count)
    dweight = weight.new_empty(weight.shape) if of_weight else None
    dxs, column = [], 0
    for x, flag, of_x in zip(xs, flags, of_xs, strict=True):
        source = as_rows(x)
        columns = slice(column, column + source.shape[1])
        column = columns.stop
        dxs.append(_dx(dz, weight[:, columns], flag, flag_stride, x) if of_x else weight.new_empty(0))
        if dweight is not None:
            _fill_dweight(dz, source, flag, flag_stride, dweight[:, columns])
    if dgate is not None and gate is not None:
        dgate = dgate.sum().to(gate.dtype) if gate.dim() == 0 else dgate.sum(0).to(gate.dtype).view(gate.shape)
    dresidual = grads[0].clone(memory_format=torch.contiguous_format) if of_residual else None
    rest = (dweight, None if dbias is None else dbias.sum(0).to(weight.dtype), None, dresidual, dgate)
    return [*dxs, *(weight.new_empty(0) if g is None else g for g in rest)]


def _dz(
    dy: Tensor,
    kept: Tensor | None,
    gate: Tensor | None,
    activation: str | None,
    from_output: bool,
    of_products: bool,
    of_bias: bool,
    of_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, and the sums of dz and of gate's gradient over each block of rows."""
    rows, features = dy.shape
    plain = activation is None and gate is None
    config = Config({"BLOCK_M": 32, "BLOCK_N": 64})
    blocks = ceil_div(rows, config.constants["BLOCK_M"])
    dz = dy if plain or not of_products else dy.new_empty((rows, features))
    dbias, dgate = (dy.new_empty((blocks, features), dtype=torch.float32) if n else None for n in (of_bias, of_gate))
    launch(
        _preactivation_gradient,
        (tiles(config, rows, features) if dbias is not None or dgate is not None or dz is not dy else 0,),
        *(dy, kept, gate, None if dz is dy else dz, dbias, dgate),
        *(rows, features, dy.stride(0), _gate_stride(gate)),
        ACTIVATION=activation,
        FROM_OUTPUT=from_output,
        config=config,
    )
    return dz, dbias, dgate


def _plain(x: Tensor, flag: Tensor | None) -> bool:
    """Whether a product of the backward is a plain one of half precision, which torch's library is best at."""
    return flag is None and x.dtype != torch.float32


def _dx(dz: Tensor, weight: Tensor, flag: Tensor | None, flag_stride: int, x: Tensor) -> Tensor:
    rows, (features, width) = dz.shape[0], weight.shape
    dx = x.new_empty(x.shape)
    if _plain(x, flag):
        torch.mm(dz, weight, out=dx.view(rows, width))
        return dx
    config = _config(weight, rows, width)
    launch(
        _input_gradient,
        (tiles(config, rows, width),),
        *(dz, weight, flag, dx),
        *(rows, features, width, dz.stride(0), weight.stride(0), flag_stride),
        PRECISION=dot_precision(weight),
        config=config,
    )
    return dx


def _fill_dweight(dz: Tensor, x: Tensor, flag: Tensor | None, flag_stride: int, dweight: Tensor) -> None:
    (rows, width), features = x.shape, dz.shape[1]
    if _plain(x, flag):
        torch.mm(dz.t(), x, out=dweight)
        return
    config = _config(x, features, width)
    count, step = tiles(config, features, width), config.constants["BLOCK_K"]
    shares = max(min(_PROGRAMS // max(count, 1), ceil_div(rows, 8 * step)), 1)
    share = max(ceil_div(ceil_div(rows, shares), step) * step, step)
    shares = max(ceil_div(rows, share), 1)
    into = dweight if shares == 1 else x.new_empty((shares, features, width), dtype=torch.float32)
    launch(
        _weight_gradient,
        (count, shares),
        *(dz, x, flag, into),
        *(rows, features, width, share, dz.stride(0), x.stride(0), flag_stride, into.stride(-2)),
        PRECISION=dot_precision(x),
        config=config,
    )
    if into is not dweight:
        dweight.copy_(into.sum(0))


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above."""
    import mmkernels as mmk

    def call(rows: int, widths: Sequence[int], features: int, **options: Any) -> Any:
        xs = [new(rows, width) for width in widths]
        return mmk.concat_linear(xs, new(features, sum(widths)), new(features), **options)

    yield "16384x(1024, 1024, 768) to 1024, gelu", lambda: call(16384, (1024, 1024, 768), 1024, activation="gelu")
    yield (
        "16384x(1024, 1024) to 1024, presence",
        lambda: call(16384, (1024, 1024), 1024, presence=new(16384, 2, dtype=torch.bool)),
    )
    yield "256x(768, 768, 512) to 768, gelu", lambda: call(256, (768, 768, 512), 768, activation="gelu")
    yield (
        "16x(304, 80, 48) to 128, relu, presence",
        lambda: call(16, (304, 80, 48), 128, activation="relu", presence=new(16, 3, dtype=torch.bool)),
    )
