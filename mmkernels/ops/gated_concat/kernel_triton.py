"""gated_concat on GPUs.

    g = σ([x; y] Wᵀ + b),   out = [g ∘ x; y; s],   s = Σ_k g_k x_k
    dz = g ∘ (1 − g) ∘ e ∘ x, summed over features where there is one gate;   e = d₁ + d₃ of d out = [d₁; d₂; d₃]
    dx = e ∘ g + dz W_x,   dy = d₂ + dz W_y

Tiling     Forward: the gates are concat_linear's product; a pass over the rows then writes out. Backward: dz and the
           bias' sums in one pass over tiles, or over whole rows for one gate; dx and dy by a product each, a program
           owning rows and columns and finishing them on its tile; dW is concat_linear's. Rows of out are not aligned,
           being one feature longer than x and y: they alone are accessed element by element, warps at a time.
Precision  sums in float32; g and dz rounded to the inputs' dtype.
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
from mmkernels.ops.concat_linear import kernel_triton as linear
from mmkernels.ops.concat_linear.op import Arguments as LinearArguments
from mmkernels.ops.gated_concat.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, next_power_of_2, tiles


@triton.jit
def _gates(gate, row, k, rows, gates, ONE_GATE: tl.constexpr):
    """Of a tile's rows and features, or one of each row."""
    if ONE_GATE:
        g = tl.load(gate + row.to(tl.int64)[:, None], mask=(row < rows)[:, None], other=0.0)
    else:
        inside = (row < rows)[:, None] & (k < gates)[None, :]
        g = tl.load(gate + row.to(tl.int64)[:, None] * gates + k[None, :], mask=inside, other=0.0)
    return g.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _write_rows(
    x,  # [rows, Kx]
    y,  # [rows, Ky]
    gate,  # [rows, gates]
    out,  # [rows, Kx + Ky + 1]
    rows,
    x_width,
    y_width,
    gates,  # Kx or 1
    x_stride,
    y_stride,
    ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (row < rows)[:, None]
    out_row = out + row.to(tl.int64)[:, None] * (x_width + y_width + 1)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, x_width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = row_inside & (k < x_width)[None, :]
        gated = tl.load(x + row.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        gated *= _gates(gate, row, k, rows, gates, ONE_GATE)
        total += gated
        tl.store(out_row + k[None, :], gated.to(out.dtype.element_ty), mask=inside)
    for start in range(0, y_width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        inside = row_inside & (k < y_width)
        copied = tl.load(y + row.to(tl.int64)[:, None] * y_stride + k, mask=inside, other=0.0)
        tl.store(out_row + x_width + k, copied, mask=inside)
    last = tl.sum(total, 1)[:, None].to(out.dtype.element_ty)
    tl.store(out_row + x_width + y_width, last, mask=row_inside)


@triton.jit(do_not_specialize=["rows"])
def _gate_gradient(
    dout,  # [rows, Kx + Ky + 1]
    x,  # [rows, Kx]
    gate,  # [rows, gates]
    dz,  # [rows, gates]
    dbias,  # [row blocks, gates] float32 or None
    rows,
    x_width,
    last,  # Kx + Ky, where s is
    gates,
    columns,  # programs to a block of rows: one for each block of gates
    dout_stride,
    x_stride,
    ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0) // columns
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = (row < rows)[:, None]
    dout_row = dout + row.to(tl.int64)[:, None] * dout_stride
    of_sum = tl.load(dout_row + last, mask=row_inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = tl.program_id(0) % columns * BLOCK_N
    for start in range(begin, x_width, columns * BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        inside = row_inside & (k < x_width)[None, :]
        e = tl.load(dout_row + k[None, :], mask=inside, other=0.0).to(tl.float32) + of_sum
        g = _gates(gate, row, k, rows, gates, ONE_GATE)
        a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += e * a * (g * (1.0 - g))
    n = begin + tl.arange(0, BLOCK_N)
    if ONE_GATE:
        total = tl.where((n == 0)[None, :], tl.sum(total, 1)[:, None], 0.0)
    dz_at = dz + row.to(tl.int64)[:, None] * gates + n[None, :]
    tl.store(dz_at, total.to(dz.dtype.element_ty), mask=row_inside & (n < gates)[None, :])
    if dbias is not None:
        tl.store(dbias + block.to(tl.int64) * gates + n, tl.sum(total, 0), mask=n < gates)


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(
    dz,  # [rows, gates]
    weight,  # [gates, Kx + Ky], from the source's first column on, as dout
    dout,  # [rows, Kx + Ky + 1]
    of_sum,  # d₃, dout's last column, or None for y
    gate,  # [rows, gates], or None for y
    dx,  # [rows, K]
    rows,
    width,  # K
    gates,
    weight_stride,
    dout_stride,
    ONE_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (k < width)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, gates, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        dz_at = row.to(tl.int64)[:, None] * gates + n[None, :]
        u = tl.load(dz + dz_at, mask=(row < rows)[:, None] & (n < gates)[None, :], other=0.0)
        w_at = n.to(tl.int64)[:, None] * weight_stride + k[None, :]
        w = tl.load(weight + w_at, mask=(n < gates)[:, None] & (k < width)[None, :], other=0.0)
        acc += tl.dot(u, w, input_precision=PRECISION)
    dout_at = row.to(tl.int64)[:, None] * dout_stride
    e = tl.load(dout + dout_at + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        e += tl.load(of_sum + dout_at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        e *= _gates(gate, row, k, rows, gates, ONE_GATE)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(dx + at, (acc + e).to(dx.dtype.element_ty), mask=inside)


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    x, y, weight, bias = a
    xs = as_rows(x), as_rows(y)
    (rows, x_width), y_width, gates = xs[0].shape, xs[1].shape[1], weight.shape[0]
    gate = linear.forward(LinearArguments([x, y], weight, bias, "sigmoid"), False)[0].view(rows, gates)
    out = x.new_empty((*x.shape[:-1], x_width + y_width + 1))
    block = min(next_power_of_2(max(x_width, y_width)), 512)
    config = Config({"BLOCK_M": 1024 // block, "BLOCK_K": block}, num_stages=1)  # 8 elements per thread
    launch(
        _write_rows,
        (ceil_div(rows, config.constants["BLOCK_M"]),),
        *(*xs, gate, out, rows, x_width, y_width, gates, xs[0].stride(0), xs[1].stride(0)),
        ONE_GATE=gates == 1,
        config=config,
    )
    return out, gate if training else gate.new_empty(0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x, y, weight, _ = a
    of_x, of_y, of_weight, of_bias = needed
    (gate,), dout = saved, as_rows(grads[0])
    xs = as_rows(x), as_rows(y)
    (rows, x_width), y_width, gates = xs[0].shape, xs[1].shape[1], weight.shape[0]
    last = x_width + y_width
    config = Config({"BLOCK_M": 32, "BLOCK_N": 64})
    blocks, columns = ceil_div(rows, config.constants["BLOCK_M"]), ceil_div(gates, config.constants["BLOCK_N"])
    dz = gate.new_empty((rows, gates))
    dbias = gate.new_empty((blocks, gates), dtype=torch.float32) if of_bias else None
    launch(
        _gate_gradient,
        (blocks * columns,),
        *(dout, xs[0], gate, dz, dbias, rows, x_width, last, gates, columns, dout.stride(0), xs[0].stride(0)),
        ONE_GATE=gates == 1,
        config=config,
    )
    dx, dy, dweight = (t.new_empty(t.shape if n else 0) for t, n in zip((x, y, weight), needed, strict=False))
    if of_x:
        _fill_input_gradient(dz, weight[:, :x_width], dout, dout[:, last:], gate, dx)
    if of_y:
        _fill_input_gradient(dz, weight[:, x_width:], dout[:, x_width:], None, None, dy)
    if of_weight:
        for source, part in zip(xs, dweight.split([x_width, y_width], 1), strict=True):
            linear._fill_dweight(dz, source, None, 0, part)
    return [dx, dy, dweight, weight.new_empty(0) if dbias is None else dbias.sum(0).to(weight.dtype)]


def _fill_input_gradient(
    dz: Tensor, weight: Tensor, dout: Tensor, of_sum: Tensor | None, gate: Tensor | None, dx: Tensor
) -> None:
    rows, (gates, width) = dz.shape[0], weight.shape
    config = linear._config(weight, rows, width)
    launch(
        _input_gradient,
        (tiles(config, rows, width),),
        *(dz, weight, dout, of_sum, gate, dx),
        *(rows, width, gates, weight.stride(0), dout.stride(0)),
        ONE_GATE=gates == 1,
        PRECISION=dot_precision(weight),
        config=config,
    )


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above, and one gate."""
    import mmkernels as mmk

    def call(rows: int, width: int, other: int, gates: int) -> Any:
        return mmk.gated_concat(new(rows, width), new(rows, other), new(gates, width + other), new(gates))

    yield "16384x(1024 + 1024)", lambda: call(16384, 1024, 1024, 1024)
    yield "256x(768 + 512)", lambda: call(256, 768, 512, 768)
    yield "16x(80 + 48)", lambda: call(16, 80, 48, 80)
    yield "8192x(256 + 256), one gate", lambda: call(8192, 256, 256, 1)
