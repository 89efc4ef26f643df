"""decision_fusion on GPUs.

    p_i = softmax(z_i);   mean: y = Σ w_i p_i,   dz_i = w_i p_i (g − g · p_i),   dw_i = g · p_i
    log, product: y = softmax(u), u = Σ w_i log p_i,   du = y (g − g · y),   dz_i = w_i du,   dw_i = du · log p_i
    max: y = m / s, m = max_i p_i, s = Σ m,   dm = (g − g · y) / s, in equal parts to those that are the maximum

Tiling     a program owns ROWS rows and walks over the modalities, once for their maxima and once or, backward, up to
           twice more for what becomes of them, from cache; one modality's tile [ROWS, C] is in registers.
Precision  float32. What "log" adds up are distances from the maxima. Gradients of weights (M,) are summed over the rows
           by torch.
Limits     C up to 8192, up to 64 modalities. One that is absent is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.decision_fusion.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2
from mmkernels.triton.pool import modalities, presence_flags, present

_UNSPECIALIZED = ["batch", "presence_row", "presence_modality", "weights_row"]


@triton.jit
def _logits(z, row, c, stride, here):
    """[ROWS, BLOCK], −inf where there is nothing."""
    at = z + row.to(tl.int64)[:, None] * stride + c
    return tl.load(at, mask=here, other=float("-inf")).to(tl.float32)


@triton.jit
def _shares(zs, weights, presence, row, c, valid, inside, z_row, weights_row, weights_modality, presence_row,
            presence_modality):  # fmt: skip
    """Of the modalities: which rows have them, their maxima there, and their shares; and whether the weights
    of a row were divided by what those of the present ones add up to, and what all were divided by."""
    heres, tops, shares = tl.tuple(()), tl.tuple(()), tl.tuple(())
    count = tl.zeros([row.shape[0]], tl.float32)
    total = tl.zeros([row.shape[0]], tl.float32)
    for i in tl.static_range(len(zs)):
        here = present(presence, valid, row, i, presence_row, presence_modality)
        top = tl.max(_logits(zs[i], row, c, z_row, here[:, None] & inside), 1)
        here = here & (top != float("-inf"))
        heres += (here,)
        tops += (tl.where(here, top, 0.0),)
        count += here.to(tl.float32)
        if weights is not None:
            at = weights + row.to(tl.int64) * weights_row + i * weights_modality
            weight = tl.load(at, mask=here, other=0.0).to(tl.float32)
            total += weight
            shares += (weight,)
    lacking = (count < len(zs)) & (total != 0.0)
    divisor = tl.maximum(count, 1.0) if weights is None else tl.where(lacking, total, 1.0)
    divided = tl.tuple(())
    for i in tl.static_range(len(zs)):
        divided += ((heres[i].to(tl.float32) if weights is None else shares[i]) / divisor,)
    return heres, tops, divided, lacking, divisor


@triton.jit
def _softmax(z, here, top):
    """Of rows that have the modality; 0 of the others."""
    e = tl.exp(z - top[:, None])
    total = tl.sum(e, 1)
    return e / tl.where(here, total, 1.0)[:, None]


@triton.jit
def _energies(zs, heres, tops, shares, row, c, inside, z_row, METHOD: tl.constexpr):
    """softmax(u) and whether any class is left, in the rows that have a modality."""
    u = tl.where(inside, 0.0, float("-inf"))
    any_here = heres[0]
    for i in tl.static_range(len(zs)):
        any_here = any_here | heres[i]
        z = _logits(zs[i], row, c, z_row, heres[i][:, None] & inside)
        x = tl.where(heres[i][:, None] & inside, z - tops[i][:, None], 0.0)
        w = heres[i].to(tl.float32) if METHOD == "product" else shares[i]
        term = tl.where(x == float("-inf"), float("-inf"), w[:, None] * x)
        u += tl.where((w != 0.0)[:, None], term, 0.0)
    most = tl.max(u, 1)
    left = any_here & (most != float("-inf"))
    e = tl.exp(u - tl.where(left, most, 0.0)[:, None])
    e = tl.where(left[:, None], e, 0.0)
    return e / tl.where(left, tl.sum(e, 1), 1.0)[:, None]


@triton.jit
def _maxima(zs, heres, tops, row, c, inside, z_row):
    most = tl.where(inside, 0.0, 0.0)
    for i in tl.static_range(len(zs)):
        z = _logits(zs[i], row, c, z_row, heres[i][:, None] & inside)
        most = tl.maximum(most, _softmax(z, heres[i], tops[i]))
    return most


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(
    zs,  # M of [B, C]
    weights,  # [B, M] or None
    presence,  # [B, M] or None
    out,  # [B, C]
    batch,
    classes,
    z_row,  # strides
    weights_row,
    weights_modality,
    presence_row,
    presence_modality,
    METHOD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    valid = row < batch
    inside = valid[:, None] & (c < classes)
    heres, tops, shares, _, _ = _shares(
        zs, weights, presence, row, c, valid, inside, z_row, weights_row, weights_modality, presence_row,
        presence_modality,
    )  # fmt: skip
    if METHOD == "log" or METHOD == "product":
        y = _energies(zs, heres, tops, shares, row, c, inside, z_row, METHOD)
    elif METHOD == "max":
        y = _maxima(zs, heres, tops, row, c, inside, z_row)
        total = tl.sum(y, 1)
        y = y / tl.where(total == 0.0, 1.0, total)[:, None]
    else:
        y = tl.where(inside, 0.0, 0.0)
        total = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(zs)):
            z = _logits(zs[i], row, c, z_row, heres[i][:, None] & inside)
            if METHOD == "mean":
                y += shares[i][:, None] * _softmax(z, heres[i], tops[i])
            else:
                chosen = tl.argmax(z, 1)
                y += tl.where(c == chosen[:, None], shares[i][:, None], 0.0)
                total += shares[i]
        if METHOD == "vote":
            y = y / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row.to(tl.int64)[:, None] * classes + c, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "g_row"])
def _backward(
    g,  # [B, C]
    zs,  # M of [B, C]
    weights,  # [B, M] or None
    presence,  # [B, M] or None
    dzs,  # M of [B, C] or None
    dweights,  # [B, M] float32, or None
    batch,
    classes,
    g_row,  # strides
    z_row,
    weights_row,
    weights_modality,
    presence_row,
    presence_modality,
    METHOD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    valid = row < batch
    inside = valid[:, None] & (c < classes)
    heres, tops, shares, lacking, divisor = _shares(
        zs, weights, presence, row, c, valid, inside, z_row, weights_row, weights_modality, presence_row,
        presence_modality,
    )  # fmt: skip
    grad = tl.load(g + row.to(tl.int64)[:, None] * g_row + c, mask=inside, other=0.0).to(tl.float32)
    there = row.to(tl.int64)[:, None] * classes + c
    if METHOD == "log" or METHOD == "product":
        y = _energies(zs, heres, tops, shares, row, c, inside, z_row, METHOD)
        pulled = y * (grad - tl.sum(grad * y, 1)[:, None])
    elif METHOD == "max":
        most = _maxima(zs, heres, tops, row, c, inside, z_row)
        total = tl.sum(most, 1)
        scale = (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        ties = tl.where(inside, 0.0, 0.0)
        for i in tl.static_range(len(zs)):
            z = _logits(zs[i], row, c, z_row, heres[i][:, None] & inside)
            ties += tl.where(heres[i][:, None] & (_softmax(z, heres[i], tops[i]) == most), 1.0, 0.0)
        pulled = scale * (grad - tl.sum(grad * most, 1)[:, None] * scale) / tl.maximum(ties, 1.0)
    else:
        pulled = grad
    slopes = tl.tuple(())
    for i in tl.static_range(len(zs)):
        here = heres[i][:, None] & inside
        slope = tl.zeros([ROWS], tl.float32)
        if METHOD == "log" or METHOD == "product":
            w = heres[i].to(tl.float32) if METHOD == "product" else shares[i]
            dz = w[:, None] * pulled
            if dweights is not None and METHOD == "log":
                z = _logits(zs[i], row, c, z_row, here)
                x = tl.where(here, z - tops[i][:, None], 0.0)
                counted = x != float("-inf")
                slope = tl.sum(tl.where(counted, pulled * tl.where(counted, x, 0.0), 0.0), 1)
                # Σ pulled = 0, but what goes to classes that i excludes, where it has no weight, is not in the sum.
                elsewhere = tl.sum(tl.where(counted, 0.0, pulled), 1)
                total = tl.sum(tl.exp(z - tops[i][:, None]), 1)
                slope += tl.where(heres[i], elsewhere * tl.log(tl.where(heres[i], total, 1.0)), 0.0)
        else:
            p = _softmax(_logits(zs[i], row, c, z_row, here), heres[i], tops[i])
            if METHOD == "max":
                dp = tl.where(p == most, pulled, 0.0)
                dz = p * (dp - tl.sum(p * dp, 1)[:, None])
            else:
                slope = tl.sum(grad * p, 1)
                dz = shares[i][:, None] * p * (grad - slope[:, None])
        if dzs[i] is not None:
            dz = tl.where(here, dz, 0.0)
            tl.store(dzs[i] + there, dz.to(g.dtype.element_ty), mask=inside)
        slopes += (tl.where(heres[i], slope, 0.0),)
    if dweights is not None:
        mean = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(zs)):
            mean += shares[i] * slopes[i]
        for i in tl.static_range(len(zs)):
            dw = tl.where(lacking, (slopes[i] - mean) / divisor, slopes[i])
            tl.store(dweights + row * len(zs) + i, tl.where(heres[i], dw, 0.0), mask=valid)


def _config(classes: int) -> Config:
    """Eight elements per thread of a tile, and few rows: every modality has numbers of each. Rows beyond 1024 classes
    take more warps."""
    block = next_power_of_2(classes)
    rows = min(max(1024 // block, 1), 32)
    return Config({"ROWS": rows, "BLOCK": block}, num_warps=min(max(block // 256, 4), 16), num_stages=1)


def _weights(weights: Tensor | None, batch: int, count: int) -> tuple[Tensor | None, int, int]:
    """As [B, M], and their strides."""
    if weights is None:
        return None, 0, 0
    by_row = weights.expand(batch, count)
    return by_row, by_row.stride(0), by_row.stride(1)


def forward(a: Arguments, training: bool) -> Tensor:
    logits, weights, method, presence = a
    zs = modalities(logits)
    batch, classes = zs[0].shape
    out = zs[0].new_empty(zs[0].shape)
    if out.numel() == 0:
        return out
    by_row, *weight_strides = _weights(weights, batch, len(zs))
    flags, *flag_strides = presence_flags(presence, batch, len(zs))
    config = _config(classes)
    launch(
        _forward,
        (ceil_div(batch, config.constants["ROWS"]),),
        *(zs, by_row, flags, out, batch, classes, zs[0].stride(0), *weight_strides, *flag_strides),
        config=config,
        METHOD=method,
    )
    return out


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    logits, weights, method, presence = a
    (g,) = grads
    zs = modalities(logits)
    batch, classes = zs[0].shape
    results = [z.new_empty(z.shape if n else 0) for z, n in zip(zs, needed, strict=False)]
    wants_weights = weights is not None and needed[len(zs)]
    dweights = g.new_empty((batch, len(zs)), dtype=torch.float32) if wants_weights else None
    if g.numel() == 0 or method == "vote":
        dweights = None if dweights is None else dweights.zero_()
        results = [x.zero_() for x in results]
    else:
        by_row, *weight_strides = _weights(weights, batch, len(zs))
        flags, *flag_strides = presence_flags(presence, batch, len(zs))
        config = _config(classes)
        launch(
            _backward,
            (ceil_div(batch, config.constants["ROWS"]),),
            *(g, zs, by_row, flags),
            tuple(x if n else None for x, n in zip(results, needed, strict=False)),
            *(dweights, batch, classes, g.stride(0), zs[0].stride(0), *weight_strides, *flag_strides),
            config=config,
            METHOD=method,
        )
    if weights is None or dweights is None:
        return [*results, g.new_empty(0), g.new_empty(0)]
    total = dweights if weights.dim() == 2 else dweights.sum(0)
    return [*results, total.to(weights.dtype), g.new_empty(0)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Classifiers of ImageNet's classes by every differentiable method, and of few classes, some absent."""
    import mmkernels as mmk

    def call(method: Any, rows: int, classes: int, count: int, **options: Any) -> Any:
        return mmk.decision_fusion([new(rows, classes) for _ in range(count)], new(count), method=method, **options)

    yield "mean of 3x4096x1000", lambda: call("mean", 4096, 1000, 3)
    yield "log of 3x4096x1000", lambda: call("log", 4096, 1000, 3)
    yield "max of 3x4096x1000", lambda: call("max", 4096, 1000, 3)
    yield (
        "log of 4x256x7, presence",
        lambda: call("log", 256, 7, 4, presence=new(256, 4, dtype=torch.bool)),
    )
