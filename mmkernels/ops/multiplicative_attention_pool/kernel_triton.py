"""multiplicative_attention_pool on GPUs.

    q' = q W,  e_i = scale · q' · x_i,  a = softmax over present i of e,  pooled = Σ_i a_i x_i
    s_i = dpooled · x_i + da_i,  de_i = a_i (s_i − Σ_j a_j s_j)
    dx_i = a_i dpooled + scale · de_i q',  dq' = scale · Σ_i de_i x_i

Tiling     a program owns ROWS rows and holds tiles [ROWS, D] of q' and of the pooled rows in registers. The forward
           reads each modality once, by an online softmax; the backward twice, the second time from cache.
Precision  float32. q W and its gradients are plain dense products, which torch's own (cuBLAS) serves as well as can be.
Limits     D up to 8192, up to 64 modalities. An absent modality is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.multiplicative_attention_pool.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2
from mmkernels.triton.pool import modalities, presence_flags, present


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _forward(
    x_ptrs,  # M of [B, D]
    query_ptr,  # [B, D]
    presence_ptr,  # [B, M] or None
    pooled_ptr,  # [B, D]
    weights_ptr,  # [B, M]
    batch,
    features,
    x_row,  # strides
    query_row,
    presence_row,
    presence_modality,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < batch
    d = tl.arange(0, BLOCK)
    inside = valid[:, None] & (d < features)[None, :]
    query = tl.load(query_ptr + row[:, None] * query_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    energies = tl.tuple(())
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    pooled = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(len(x_ptrs)):
        there = present(presence_ptr, valid, row, i, presence_row, presence_modality)
        x = tl.load(x_ptrs[i] + row[:, None] * x_row + d[None, :], mask=inside & there[:, None], other=0.0)
        x = x.to(tl.float32)
        energy = tl.where(there, scale * tl.sum(query * x, 1), float("-inf"))
        higher = tl.maximum(top, energy)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - shift)
        share = tl.exp(energy - shift)
        total = total * kept + share
        pooled = pooled * kept[:, None] + tl.where(there[:, None], share[:, None] * x, 0.0)
        top = higher
        energies += (energy,)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    pooled = pooled / total[:, None]
    tl.store(pooled_ptr + row[:, None] * features + d[None, :], pooled.to(pooled_ptr.dtype.element_ty), mask=inside)
    for i in tl.static_range(len(x_ptrs)):
        weight = tl.exp(energies[i] - top) / total
        at = weights_ptr + row * len(x_ptrs) + i
        tl.store(at, weight.to(weights_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _backward(
    g_ptr,  # [B, D]
    gweights_ptr,  # [B, M]
    x_ptrs,  # M of [B, D]
    query_ptr,  # [B, D]
    presence_ptr,  # [B, M] or None
    weights_ptr,  # [B, M]
    dx_ptrs,  # M of [B, D] or None
    dquery_ptr,  # [B, D] or None
    batch,
    features,
    g_row,
    gweights_row,
    x_row,
    query_row,
    presence_row,
    presence_modality,
    dx_row,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < batch
    d = tl.arange(0, BLOCK)
    inside = valid[:, None] & (d < features)[None, :]
    g = tl.load(g_ptr + row[:, None] * g_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    query = tl.load(query_ptr + row[:, None] * query_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
    slopes = tl.tuple(())
    weights = tl.tuple(())
    presences = tl.tuple(())
    mean = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(x_ptrs)):
        there = present(presence_ptr, valid, row, i, presence_row, presence_modality)
        weight = tl.load(weights_ptr + row * len(x_ptrs) + i, mask=there, other=0.0).to(tl.float32)
        slope = tl.load(gweights_ptr + row * gweights_row + i, mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptrs[i] + row[:, None] * x_row + d[None, :], mask=inside & there[:, None], other=0.0)
        slope += tl.sum(g * x.to(tl.float32), 1)
        mean += weight * slope
        slopes += (slope,)
        weights += (weight,)
        presences += (there,)
    dquery = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(len(x_ptrs)):
        there = presences[i][:, None]
        de = (scale * weights[i] * (slopes[i] - mean))[:, None]
        if dx_ptrs[i] is not None:
            dx = tl.where(there, weights[i][:, None] * g + de * query, 0.0)
            tl.store(dx_ptrs[i] + row[:, None] * dx_row + d[None, :], dx.to(g_ptr.dtype.element_ty), mask=inside)
        if dquery_ptr is not None:
            x = tl.load(x_ptrs[i] + row[:, None] * x_row + d[None, :], mask=inside & there, other=0.0)
            dquery += tl.where(there, de * x.to(tl.float32), 0.0)
    if dquery_ptr is not None:
        at = dquery_ptr + row[:, None] * features + d[None, :]
        tl.store(at, dquery.to(dquery_ptr.dtype.element_ty), mask=inside)


def _config(features: int) -> Config:
    """Sixteen elements per thread of every tile, two 16-byte accesses of a half-precision row; wide rows take more
    warps."""
    block = next_power_of_2(features)
    warps = min(max(block // 512, 4), 16)
    return Config({"ROWS": max(2048 // block, 1), "BLOCK": block}, num_warps=warps, num_stages=1)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    xs, query, weight, scale, presence = a
    views = modalities(xs)
    batch, features = views[0].shape
    projected = query if weight is None else query @ weight
    pooled, weights = query.new_empty((batch, features)), query.new_empty((batch, len(views)))
    flags, flag_row, flag_modality = presence_flags(presence, batch, len(views))
    config = _config(features)
    launch(
        _forward,
        (ceil_div(batch, config.constants["ROWS"]),),
        *(views, projected, flags, pooled, weights, batch, features),
        *(views[0].stride(0), projected.stride(0), flag_row, flag_modality, scale),
        config=config,
    )
    return pooled, weights, query.new_empty(0) if weight is None or not training else projected


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, query, weight, scale, presence = a
    g, gweights = grads
    views = modalities(xs)
    batch, features = views[0].shape
    projected = query if weight is None else saved[2]
    dxs = [x.new_empty(x.shape) if n else None for x, n in zip(xs, needed, strict=False)]
    stacked = xs[0].dim() == 3
    parts: Sequence[Tensor | None] = dxs
    if stacked:
        parts = [None] * len(views) if dxs[0] is None else dxs[0].unbind(1)
    wants_query, wants_weight = needed[len(xs)], needed[len(xs) + 1]
    dprojected = g.new_empty((batch, features)) if wants_query or wants_weight else None
    flags, flag_row, flag_modality = presence_flags(presence, batch, len(views))
    config = _config(features)
    launch(
        _backward,
        (ceil_div(batch, config.constants["ROWS"]),),
        *(g, gweights, views, projected, flags, saved[1], tuple(parts), dprojected, batch, features),
        *(g.stride(0), gweights.stride(0), views[0].stride(0), projected.stride(0), flag_row, flag_modality),
        *(len(views) * features if stacked else features, scale),
        config=config,
    )
    dquery = dweight = None
    if dprojected is not None:
        dquery = dprojected if weight is None else dprojected @ weight.T if wants_query else None
        dweight = query.T @ dprojected if weight is not None and wants_weight else None
    return [g.new_empty(0) if x is None else x for x in (*dxs, dquery, dweight, None)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Utterances of a few modalities, with and without a weight, and rows wider than one warp's share."""
    import mmkernels as mmk

    xs, query, weight = [new(4096, 768) for _ in range(3)], new(4096, 512), new(512, 768)
    presence = new(4096, 3, dtype=torch.bool)
    yield "3x4096x768, presence", lambda: mmk.multiplicative_attention_pool(xs, query, weight=weight, presence=presence)
    wide, question = new(4096, 4, 4096), new(4096, 4096)
    yield "4x4096x4096 stacked", lambda: mmk.multiplicative_attention_pool(wide, question)
