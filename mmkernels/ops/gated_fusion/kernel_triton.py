"""gated_fusion on GPUs.

    h_i = tanh(x_i W_iᵀ + b_i),   w = softmax over present i of (u = [x₁; …; x_M] W_zᵀ + b_z),   y = Σ_i w_i ∘ h_i
    da_i = g ∘ w_i ∘ (1 − h_i²),   du_i = g ∘ w_i ∘ (h_i − y),   dx_i = da_i W_i + du W_z,i     (g = dy)

The sigmoid form, of two modalities, is the softmax of (u, 0), and du = g ∘ w₁ ∘ w₂ ∘ (h₁ − h₂).

Tiling     Forward: h and u by concat_linear's products; a pass over tiles then walks over the modalities, by an online
           softmax, and once more to write w. Backward: da and du side by side, and the sums over rows, in one pass over
           tiles; dx of a modality, a program owning rows and columns of it, by both its products on one tile; the
           gradients of the weights are concat_linear's. A block of rows none of which has a modality skips it.
Precision  sums in float32; h, u, w, da and du rounded to the inputs' dtype.
Limits     none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._rows import as_rows
from mmkernels.ops.concat_linear import kernel_triton as linear
from mmkernels.ops.gated_fusion.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, tiles


@triton.jit
def _logit(
    logits,  # [rows, gates]
    presence,  # [rows, M] or None
    i,
    row,
    n,
    rows,
    features,
    gates,
    presence_stride,
):
    """u of modality i on a tile: 0 beyond the gates, −∞ where it is absent."""
    n += i * features
    at = row.to(tl.int64)[:, None] * gates + n[None, :]
    u = tl.load(logits + at, mask=(row < rows)[:, None] & (n < gates)[None, :], other=0.0).to(tl.float32)
    if presence is not None:
        there = tl.load(presence + row.to(tl.int64) * presence_stride + i, mask=row < rows, other=0) != 0
        u = tl.where(there[:, None], u, -float("inf"))
    return u


@triton.jit(do_not_specialize=["rows"])
def _mix(
    values,  # h, [rows, M·N]
    logits,  # u, [rows, gates]
    presence,  # [rows, M] or None
    weights,  # w, [rows, M·N], or None
    y,  # [rows, N]
    rows,
    features,  # N
    modalities,  # M
    gates,  # M·N, or N for the sigmoid form
    presence_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (n < features)[None, :]
    at = row.to(tl.int64)[:, None] * (modalities * features) + n[None, :]
    top = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, modalities):
        u = _logit(logits, presence, i, row, n, rows, features, gates, presence_stride)
        h = tl.load(values + at + i * features, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(top, u)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - shift)
        share = tl.exp(u - shift)
        total = total * kept + share
        mixed = mixed * kept + share * h
        top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    y_at = row.to(tl.int64)[:, None] * features + n[None, :]
    tl.store(y + y_at, (mixed / total).to(y.dtype.element_ty), mask=inside)
    if weights is not None:
        for i in range(0, modalities):
            u = _logit(logits, presence, i, row, n, rows, features, gates, presence_stride)
            w = tl.exp(u - top) / total
            tl.store(weights + at + i * features, w.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def _store(dz, sums, at, sum_at, inside, n_inside, d):
    """A tile of dz, and its sums over rows."""
    tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)
    if sums is not None:
        tl.store(sums + sum_at, tl.sum(d, 0), mask=n_inside)


@triton.jit(do_not_specialize=["rows"])
def _product_gradients(
    dy,  # [rows, N]
    values,  # [rows, M·N]
    weights,  # [rows, M·N]
    dz,  # da and du, [rows, M·N + gates]
    sums,  # [row blocks, M·N + gates] float32 or None
    rows,
    features,  # N
    modalities,  # M
    gates,  # M·N, or N for the sigmoid form
    dy_stride,
    SIGMOID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    block = tl.program_id(0) // columns
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < features
    inside = (row < rows)[:, None] & n_inside[None, :]
    g = tl.load(dy + row.to(tl.int64)[:, None] * dy_stride + n[None, :], mask=inside, other=0.0).to(tl.float32)
    width = modalities * features
    at = row.to(tl.int64)[:, None] * width + n[None, :]
    dz_at = row.to(tl.int64)[:, None] * (width + gates) + n[None, :]
    sum_at = block.to(tl.int64) * (width + gates) + n
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, modalities):
        h = tl.load(values + at + i * features, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weights + at + i * features, mask=inside, other=0.0).to(tl.float32)
        y += w * h
        _store(dz, sums, dz_at + i * features, sum_at + i * features, inside, n_inside, g * w * (1.0 - h * h))
    dz_at += width
    sum_at += width
    if SIGMOID:
        h = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        h -= tl.load(values + at + features, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
        w *= tl.load(weights + at + features, mask=inside, other=0.0).to(tl.float32)
        _store(dz, sums, dz_at, sum_at, inside, n_inside, g * w * h)
    else:
        for i in range(0, modalities):
            h = tl.load(values + at + i * features, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weights + at + i * features, mask=inside, other=0.0).to(tl.float32)
            _store(dz, sums, dz_at + i * features, sum_at + i * features, inside, n_inside, g * w * (h - y))


@triton.jit
def _add_product(
    acc,  # [M, K]
    dz_row,  # of each row [features]
    weight,  # [features, width]
    here,  # whether a row has the modality
    k,
    features,
    width,
    weight_stride,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + dz W of a tile."""
    end = tl.where(tl.max(here.to(tl.int32), 0) > 0, features, 0)
    w_at = tl.arange(0, BLOCK_K)[:, None] * weight_stride + k[None, :]  # in 32 bits from a block's first row on
    for start in range(0, end, BLOCK_K):
        n = start + tl.arange(0, BLOCK_K)
        d = tl.load(dz_row + n[None, :], mask=here[:, None] & (n < features)[None, :], other=0.0)
        w_block = weight + tl.cast(start, tl.int64) * weight_stride
        w = tl.load(w_block + w_at, mask=(n < features)[:, None] & (k < width)[None, :], other=0.0)
        acc += tl.dot(d, w, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(
    da,  # [rows, N]
    du,  # [rows, gates]
    value_weight,  # [N, K]
    gate_weight,  # [gates, ΣK], from the modality's first column on
    presence,  # of the modality, [rows] or None
    dx,  # [rows, K]
    rows,
    features,  # N
    gates,
    width,  # K
    dz_stride,  # of da and du
    value_weight_stride,
    gate_weight_stride,
    presence_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    here = linear._present(presence, presence_stride, row, rows)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dz_at = row.to(tl.int64)[:, None] * dz_stride
    acc = _add_product(acc, da + dz_at, value_weight, here, k, features, width, value_weight_stride, PRECISION, BLOCK_K)
    acc = _add_product(acc, du + dz_at, gate_weight, here, k, gates, width, gate_weight_stride, PRECISION, BLOCK_K)
    at = row.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(dx + at, acc.to(dx.dtype.element_ty), mask=(row < rows)[:, None] & (k < width)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------

_TILES = Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8)  # of the passes without a product


def _project(
    xs: Sequence[Tensor],  # each [rows, K]
    weight: Tensor,  # [N, ΣK]
    bias: Tensor | None,
    activation: str | None,
    flags: tuple[Tensor | None, ...],
    flag_stride: int,
    y: Tensor,  # [rows, N]
) -> None:
    """concat_linear, written to where y is."""
    rows, features = y.shape
    config = linear._config(weight, rows, features)
    launch(
        linear._forward,
        (tiles(config, rows, features),),
        *(tuple(xs), tuple(x.stride(0) for x in xs), tuple(x.shape[1] for x in xs)),
        *(weight, bias, flags, None, None, None, y),
        *(rows, features, weight.stride(0), flag_stride, 0, 0, y.stride(0)),
        ACTIVATION=activation,
        PRECISION=dot_precision(weight),
        config=config,
    )


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    xs, value_weights, value_biases, gate_weight, gate_bias, presence = a
    count, features, gates = len(xs), value_weights[0].shape[0], gate_weight.shape[0]
    y = gate_weight.new_empty((*xs[0].shape[:-1], features))
    sources = [as_rows(x) for x in xs]
    rows = sources[0].shape[0]
    values, logits = y.new_empty((rows, count * features)), y.new_empty((rows, gates))
    weights = y.new_empty(values.shape if training else 0)
    presence = None if presence is None else presence.contiguous()
    flags, flag_stride = linear._flags(presence, count)
    for i in range(count):
        bias = value_biases[i] if value_biases else None
        into = values[:, i * features : (i + 1) * features]
        _project(sources[i : i + 1], value_weights[i], bias, "tanh", flags[i : i + 1], flag_stride, into)
    _project(sources, gate_weight, gate_bias, None, flags, flag_stride, logits)
    launch(
        _mix,
        (tiles(_TILES, rows, features),),
        *(values, logits, presence, weights if training else None, y),
        *(rows, features, count, gates, flag_stride),
        config=_TILES,
    )
    return y, values if training else values.new_empty(0), weights


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, value_weights, _, gate_weight, _, presence = a
    (values, weights), dy = saved, as_rows(grads[0])
    count, (rows, features), gates = len(xs), dy.shape, gate_weight.shape[0]
    of_xs, of_weights = needed[:count], needed[count : 2 * count]
    *of_biases, of_gate_weight, of_gate_bias, _ = needed[2 * count :]
    of_sums = (*of_biases, of_gate_bias)
    dz = dy.new_empty((rows, count * features + gates))
    blocks = ceil_div(rows, _TILES.constants["BLOCK_M"])
    sums = dz.new_empty((blocks, dz.shape[1]), dtype=torch.float32) if any(of_sums) else None
    launch(
        _product_gradients,
        (tiles(_TILES, rows, features),),
        *(dy, values, weights, dz, sums, rows, features, count, gates, dy.stride(0)),
        SIGMOID=gates != count * features,
        config=_TILES,
    )
    parts = [features] * count + [gates]
    *das, du = dz.split(parts, 1)
    flags, flag_stride = linear._flags(presence, count)
    dgate_weight = gate_weight.new_empty(gate_weight.shape if of_gate_weight else 0)
    dxs, dweights, column = [], [], 0
    for i, x in enumerate(xs):
        source = as_rows(x)
        columns = slice(column, column + source.shape[1])
        column = columns.stop
        dxs.append(x.new_empty(x.shape if of_xs[i] else 0))
        if of_xs[i]:
            _fill_dx(das[i], du, value_weights[i], gate_weight[:, columns], flags[i], flag_stride, dxs[i])
        dweights.append(x.new_empty(value_weights[i].shape if of_weights[i] else 0))
        if of_weights[i]:
            linear._fill_dweight(das[i], source, flags[i], flag_stride, dweights[i])
        if of_gate_weight:
            linear._fill_dweight(du, source, flags[i], flag_stride, dgate_weight[:, columns])
    dbiases = [dy.new_empty(0) for _ in of_sums]
    if sums is not None:
        totals = sums.sum(0).split(parts)[-len(of_sums) :]
        dbiases = [t.to(dy.dtype, copy=True) if n else e for t, n, e in zip(totals, of_sums, dbiases, strict=True)]
    return [*dxs, *dweights, *dbiases[:-1], dgate_weight, dbiases[-1], dy.new_empty(0)]


def _fill_dx(
    da: Tensor,
    du: Tensor,
    value_weight: Tensor,
    gate_weight: Tensor,
    flag: Tensor | None,
    flag_stride: int,
    dx: Tensor,
) -> None:
    (rows, features), (gates, width) = da.shape, gate_weight.shape
    config = linear._config(gate_weight, rows, width)
    if rows <= 16:
        config = replace(config, constants={**config.constants, "BLOCK_K": 32})  # two products at a time
    launch(
        _input_gradient,
        (tiles(config, rows, width),),
        *(da, du, value_weight, gate_weight, flag, dx, rows, features, gates, width),
        *(da.stride(0), value_weight.stride(0), gate_weight.stride(0), flag_stride),
        PRECISION=dot_precision(gate_weight),
        config=config,
    )


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the configurations above, in both forms."""
    import mmkernels as mmk

    def call(rows: int, widths: Sequence[int], features: int, gates: int, presence: Tensor | None = None) -> Any:
        return mmk.gated_fusion(
            [new(rows, k) for k in widths],
            [new(features, k) for k in widths],
            [new(features) for _ in widths],
            new(gates, sum(widths)),
            new(gates),
            presence=presence,
        )

    yield "16384x(1024 + 1024) to 1024", lambda: call(16384, (1024, 1024), 1024, 1024)
    yield (
        "256x(768, 512, 512) to 512, presence",
        lambda: call(256, (768, 512, 512), 512, 1536, new(256, 3, dtype=torch.bool)),
    )
    yield "16x(304 + 256) to 64", lambda: call(16, (304, 256), 64, 64)
