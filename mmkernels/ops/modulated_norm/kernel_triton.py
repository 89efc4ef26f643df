"""modulated_norm on GPUs.

    y = n · (1 + scale) + shift,   n = x̂ · w + b,   x̂ = (x − mean) · rstd     (rms: mean = 0; no norm: n = x)

Tiling     a program owns a run of tokens of one batch element and holds a token, or several narrow ones, in registers,
           so that x is read once; the condition of a batch element stays in registers over the run. The backward, which
           reads it again from the nearest cache, adds up the gradients of what the tokens share over its run, and torch
           adds the runs up, in their order.
Precision  float32 from the centred row.
Limits     C up to 4096, what the registers of one program hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.modulated_norm.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch
from mmkernels.triton.norm import norm_gradient, normalized, row_config

_LENGTHS = ["length", "run"]


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    x_ptr,  # [B, L, C]
    shift_ptr,  # [B, 1 or L, C]
    scale_ptr,
    weight_ptr,  # [C] or None
    bias_ptr,
    y_ptr,  # [B, L, C], contiguous
    length,  # L
    features,  # C
    run,  # tokens per program, a multiple of ROWS
    x_batch,  # strides
    x_token,
    shift_batch,
    shift_token,
    scale_batch,
    scale_token,
    eps,
    NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,  # whether every token has its own condition
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # features in registers, a power of two
):
    runs = tl.cdiv(length, run)
    batch = (tl.program_id(0) // runs).to(tl.int64)
    begin = (tl.program_id(0) % runs) * run
    c = tl.arange(0, BLOCK)[None, :]
    column = c < features
    shift_ptr += batch * shift_batch + c
    scale_ptr += batch * scale_batch + c
    if not PER_TOKEN:
        shift = tl.load(shift_ptr, mask=column, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr, mask=column, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=column, other=0.0).to(tl.float32)
    for first in range(begin, tl.minimum(begin + run, length), ROWS):
        token = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (token < length) & column
        if PER_TOKEN:
            shift = tl.load(shift_ptr + token * shift_token, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + token * scale_token, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + batch * x_batch + token * x_token + c, mask=inside, other=0.0).to(tl.float32)
        n, _ = normalized(x, inside, features, eps, NORM)
        if weight_ptr is not None:
            n = n * weight
        if bias_ptr is not None:
            n = n + bias
        y = n * (1.0 + scale) + shift
        tl.store(y_ptr + (batch * length + token) * features + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    g_ptr,  # [B, L, C]
    x_ptr,
    scale_ptr,  # [B, 1 or L, C]
    weight_ptr,  # [C] or None
    bias_ptr,
    dx_ptr,  # [B, L, C] or None, contiguous as all gradients
    dshift_ptr,  # [B, L, C] per token, else [B, runs, C] float32, or None
    dscale_ptr,
    dweight_ptr,  # [B, runs, C] float32 or None
    dbias_ptr,
    length,
    features,
    run,
    g_batch,
    g_token,
    x_batch,
    x_token,
    scale_batch,
    scale_token,
    eps,
    NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    runs = tl.cdiv(length, run)
    batch = (tl.program_id(0) // runs).to(tl.int64)
    begin = (tl.program_id(0) % runs) * run
    c = tl.arange(0, BLOCK)[None, :]
    column = c < features
    dshift = tl.zeros([ROWS, BLOCK], tl.float32)
    dscale = tl.zeros([ROWS, BLOCK], tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, tl.minimum(begin + run, length), ROWS):
        token = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (token < length) & column
        here = (batch * length + token) * features + c
        scale_at = scale_ptr + batch * scale_batch + token * scale_token + c
        scale = tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + batch * g_batch + token * g_token + c, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + batch * x_batch + token * x_token + c, mask=inside, other=0.0).to(tl.float32)
        x, rstd = normalized(x, inside, features, eps, NORM)
        n = x
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=column, other=0.0).to(tl.float32)
            n = n * weight
        if bias_ptr is not None:
            n = n + tl.load(bias_ptr + c, mask=column, other=0.0).to(tl.float32)
        dn = g * (1.0 + scale)
        if PER_TOKEN:
            if dshift_ptr is not None:
                tl.store(dshift_ptr + here, g.to(dshift_ptr.dtype.element_ty), mask=inside)
            if dscale_ptr is not None:
                tl.store(dscale_ptr + here, (g * n).to(dscale_ptr.dtype.element_ty), mask=inside)
        else:
            dshift += g
            dscale += g * n
        dweight += dn * x
        dbias += dn
        if dx_ptr is not None:
            if weight_ptr is not None:
                dn = dn * weight
            dx = norm_gradient(dn, x, rstd, features, NORM)
            tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    there = tl.program_id(0).to(tl.int64) * features + c
    if not PER_TOKEN:
        if dshift_ptr is not None:
            tl.store(dshift_ptr + there, tl.sum(dshift, 0, keep_dims=True), mask=column)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + there, tl.sum(dscale, 0, keep_dims=True), mask=column)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + there, tl.sum(dweight, 0, keep_dims=True), mask=column)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + there, tl.sum(dbias, 0, keep_dims=True), mask=column)


def _run(x: Tensor, config: Config) -> int:
    """Tokens per program: enough programs to fill a GPU twice, and few runs for torch to add up."""
    batch, length, _ = x.shape
    rows = config.constants["ROWS"]
    return min(max(ceil_div(batch * ceil_div(length, rows), 2048), 1), 64) * rows


def forward(a: Arguments, training: bool) -> Tensor:
    x, shift, scale, norm, weight, bias, eps = a
    y = x.new_empty(x.shape)
    batch, length, features = x.shape
    config = row_config(features, length)
    run = _run(x, config)
    launch(
        _forward,
        (batch * ceil_div(length, run) if features else 0,),
        *(x, shift, scale, weight, bias, y),
        *(length, features, run),
        *(*x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2]),
        eps,
        NORM=norm,
        PER_TOKEN=shift.shape[1] != 1,
        config=config,
    )
    return y


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    x, shift, scale, norm, weight, bias, eps = a
    (g,) = grads
    batch, length, features = x.shape
    config = row_config(features, length)
    run = _run(x, config)
    runs = ceil_div(length, run)
    per_token = shift.shape[1] != 1

    def fresh(index: int, shared: bool) -> Tensor | None:
        """Where the gradient of an argument goes, or its sum over each run."""
        if not needed[index]:
            return None
        return x.new_empty((batch, runs, features), dtype=torch.float32) if shared else x.new_empty(x.shape)

    dx, dshift, dscale = fresh(0, False), fresh(1, not per_token), fresh(2, not per_token)
    dweight, dbias = fresh(3, True), fresh(4, True)
    launch(
        _backward,
        (batch * runs if features else 0,),
        *(g, x, scale, weight, bias, dx, dshift, dscale, dweight, dbias),
        *(length, features, run),
        *(*g.stride()[:2], *x.stride()[:2], scale.stride(0), scale.stride(1) if per_token else 0),
        eps,
        NORM=norm,
        PER_TOKEN=per_token,
        config=config,
        enable_fp_fusion=False,
    )
    if not per_token:
        dshift, dscale = (None if t is None else t.sum(1, keepdim=True).to(x.dtype) for t in (dshift, dscale))
    dweight, dbias = (None if t is None else t.sum((0, 1)).to(x.dtype) for t in (dweight, dbias))
    return [x.new_empty(0) if t is None else t for t in (dx, dshift, dscale, dweight, dbias)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A row by itself, narrow ones together, the widest."""
    import mmkernels as mmk

    def wide(features: int) -> Any:
        condition = new(1, features), new(1, features)
        return mmk.modulated_norm(new(1, 64, features), *condition, norm_weight=new(features), norm_bias=new(features))

    yield "4x1024x1152", lambda: mmk.modulated_norm(new(4, 1024, 1152), new(4, 1152), new(4, 1152))
    yield "64x196x128", lambda: mmk.modulated_norm(new(64, 196, 128), new(64, 196, 128), new(64, 196, 128))
    yield "1x64x4096, weights", lambda: wide(4096)
