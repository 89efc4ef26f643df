"""sigmoid_contrastive_loss on GPUs.

    t_ij = s x_i·y_j + b,  l_ij = 1 for the positive of row i, else −1,  loss = Σ_ij log(1 + e^{−l t}) / total
    d_ij = −l σ(−l t);  dx_i = s/total Σ_j d_ij y_j,  ds = Σ_ij d_ij x_i·y_j / total,  db = Σ_ij d_ij / total

Tiling     Forward: a program owns a tile of scores, which stays in its registers, and leaves its sum; torch adds the
           sums up, in their order. Where gradients are wanted the forward makes them, as no sum over a row comes
           first: slopes of a strip of rows at a time are multiplied with y and x; the backward scales what it left.
Precision  products in the inputs' dtype with float32 sums; slopes, without s/total, rounded to the inputs' dtype.
Limits     any D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.sigmoid_contrastive_loss.op import Arguments
from mmkernels.triton.contrastive import SLOPE_PAIRS, Gradients, config, cosines, gain, slope_stride, strips
from mmkernels.triton.launch import dot_precision, launch, tiles
from mmkernels.triton.math import sigmoid, softplus


@triton.jit(do_not_specialize=["rows", "columns", "first_target"])
def _sums(
    x,  # [rows, D]
    y,  # [columns, D]
    scale,  # 0-d
    bias,  # 0-d
    sums,  # [tiles] float32
    rows,
    columns,
    features,
    first_target,
    x_stride,
    y_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    i = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    t = cosines(x, y, i, j, rows, columns, features, x_stride, y_stride, BLOCK_K, PRECISION)
    t = t * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    positive = (i + first_target)[:, None] == j[None, :]
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, softplus(tl.where(positive, -t, t)), 0.0)))


@triton.jit(do_not_specialize=["rows", "columns", "first_target"])
def _slopes(
    x,  # [rows, D]
    y,  # [columns, D]
    scale,  # 0-d
    bias,  # 0-d
    slopes,  # [rows, columns]
    sums,  # [3, tiles] float32, of the loss, Σ d x_i·y_j and Σ d
    rows,
    columns,
    features,
    first_target,
    x_stride,
    y_stride,
    slope_stride,
    gain,  # what the slopes are stored multiplied by
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    i = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    cosine = cosines(x, y, i, j, rows, columns, features, x_stride, y_stride, BLOCK_K, PRECISION)
    t = cosine * tl.load(scale).to(tl.float32) + tl.load(bias).to(tl.float32)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    positive = (i + first_target)[:, None] == j[None, :]
    t = tl.where(positive, -t, t)
    d = sigmoid(t)
    d = tl.where(inside, tl.where(positive, -d, d), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, softplus(t), 0.0)))
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(d * cosine))
    tl.store(sums + 2 * tl.num_programs(0) + tl.program_id(0), tl.sum(d))
    at = i.to(tl.int64)[:, None] * slope_stride + j[None, :]
    tl.store(slopes + at, (d * gain).to(slopes.dtype.element_ty), mask=inside)


def forward(a: Arguments, training: bool) -> tuple[Tensor, ...]:
    x, y, logit_scale, logit_bias, first_target, total, of_x, of_y = a
    (rows, features), columns = x.shape, y.shape[0]
    if training:
        return _with_gradients(x, y, logit_scale, logit_bias, first_target, max(total, 1), (of_x, of_y))
    chosen = config(x, rows, columns, True)
    sums = x.new_empty(tiles(chosen, rows, columns), dtype=torch.float32)
    launch(
        _sums,
        (tiles(chosen, rows, columns),),
        *(x, y, logit_scale, logit_bias, sums, rows, columns, features, first_target, x.stride(0), y.stride(0)),
        PRECISION=dot_precision(x),
        config=chosen,
    )
    nothing = sums.new_empty(0)
    return sums.sum() / max(total, 1), nothing, nothing, nothing


def _with_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    first_target: int,
    total: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The loss and its gradients, those of x and y, where they are wanted, and of scale and bias, [2], in float32."""
    (rows, features), columns = x.shape, y.shape[0]
    gradients = Gradients(x, y, logit_scale / total, (wanted[0], wanted[1]), torch.float32)
    sums = [logit_scale.new_zeros(3)]  # of the loss and of the slopes of scale and bias, over each strip
    for strip in strips(rows, columns, features, SLOPE_PAIRS):
        count = strip.stop - strip.start
        chosen = config(x, count, columns, True)
        slopes = x.new_empty((count, slope_stride(columns)))
        parts = x.new_empty((3, tiles(chosen, count, columns)), dtype=torch.float32)
        launch(
            _slopes,
            (tiles(chosen, count, columns),),
            *(x[strip], y, logit_scale, logit_bias, slopes, parts),
            *(count, columns, features, first_target + strip.start, x.stride(0), y.stride(0)),
            *(slope_stride(columns), gain(x)),
            PRECISION=dot_precision(x),
            config=chosen,
        )
        gradients.add(strip, slopes)
        sums.append(parts.sum(1))
    means = torch.stack(sums).sum(0) / total
    dx, dy = (means.new_empty(0) if d is None else d for d in (gradients.dx, gradients.dy))
    return means[0].clone(), dx, dy, means[1:].clone()


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x, y, logit_scale, logit_bias, first_target, total, _, _ = a
    dx, dy, scalars = saved
    if any(n and d.numel() != leaf.numel() for n, d, leaf in zip(needed, (dx, dy), (x, y), strict=False)):
        _, dx, dy, scalars = _with_gradients(x, y, logit_scale, logit_bias, first_target, max(total, 1), needed)
    leaves = zip((x, y, logit_scale, logit_bias), (dx, dy, *scalars), needed, strict=True)
    return [(d * grads[0]).to(leaf.dtype) if n else leaf.new_empty(0) for leaf, d, n in leaves]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A batch with enough tiles for the larger ones, and a small one of many features."""
    import mmkernels as mmk

    x, y = new(4096, 512), new(4096, 512)
    yield "4096x512", lambda: mmk.sigmoid_contrastive_loss(x, y, new(), new())
    few, others = new(256, 1024), new(256, 1024)
    yield "256x1024", lambda: mmk.sigmoid_contrastive_loss(few, others, new(), new())
