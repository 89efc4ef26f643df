"""split_attention_pool on GPUs.

    g = Σ x_i over present i,  z = act(g W₁ᵀ + b₁),  e = z W₂ᵀ + b₂ as [B, M, D]
    a = softmax over present i of e, per feature,  pooled = Σ_i a_i ∘ x_i
    s_i = dpooled ∘ x_i + da_i,  de_i = a_i ∘ (s_i − Σ_j a_j ∘ s_j),  dx_i = a_i ∘ dpooled + dg

Tiling     Passes over tiles of rows and features, which walk over the modalities: g; a and pooled by an online softmax,
           once more over e to write a; de, walking twice, the second time from cache; dx. The two layers between them,
           forward and backward, are concat_linear's.
Precision  sums and softmax in float32; g, z, e, a, de and dg rounded to the inputs' dtype.
Limits     up to 64 modalities. An absent one is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.concat_linear import kernel_triton as linear
from mmkernels.ops.concat_linear.op import Arguments as LinearArguments
from mmkernels.ops.split_attention_pool.op import Arguments
from mmkernels.triton.launch import Config, launch, tiles
from mmkernels.triton.math import number, pick
from mmkernels.triton.pool import modalities, needed_modalities, presence_flags, present


@triton.jit
def _tile(batch, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's rows and features, and which of the features there are."""
    columns = tl.cdiv(features, BLOCK_N)
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, n, n < features


@triton.jit
def _load(x, row, n, stride, mask):
    return tl.load(x + row.to(tl.int64)[:, None] * stride + n, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, row, n, stride, mask, value):
    tl.store(x + row.to(tl.int64)[:, None] * stride + n, value.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _sum(
    xs,  # M of [B, D]
    presence,  # [B, M] or None
    total,  # g, [B, D]
    batch,
    features,
    x_row,  # strides
    presence_row,
    presence_modality,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, n, n_inside = _tile(batch, features, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, len(xs)):
        here = present(presence, row < batch, row, i, presence_row, presence_modality)
        acc += _load(pick(xs, tl.cast(i, tl.int32)), row, n, x_row, here[:, None] & n_inside)
    _store(total, row, n, features, (row < batch)[:, None] & n_inside, acc)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _pool(
    xs,  # M of [B, D]
    energies,  # e, [B, M, D]
    presence,  # [B, M] or None
    pooled,  # [B, D]
    weights,  # a, [B, M, D]
    batch,
    features,
    x_row,
    presence_row,
    presence_modality,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, n, n_inside = _tile(batch, features, BLOCK_M, BLOCK_N)
    inside = (row < batch)[:, None] & n_inside
    top = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, len(xs)):
        here = present(presence, row < batch, row, i, presence_row, presence_modality)[:, None]
        energy = _load(energies + i * features, row, n, len(xs) * features, here & n_inside)
        energy = tl.where(here, energy, -float("inf"))
        x = _load(pick(xs, tl.cast(i, tl.int32)), row, n, x_row, here & n_inside)
        higher = tl.maximum(top, energy)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(top - shift)
        share = tl.exp(energy - shift)
        total = total * kept + share
        mixed = mixed * kept + share * x
        top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    _store(pooled, row, n, features, inside, mixed / total)
    for i in range(0, len(xs)):
        here = present(presence, row < batch, row, i, presence_row, presence_modality)[:, None]
        energy = _load(energies + i * features, row, n, len(xs) * features, here & n_inside)
        share = tl.where(here, tl.exp(energy - top) / total, 0.0)
        _store(weights + i * features, row, n, len(xs) * features, inside, share)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _energy_gradients(
    g,  # dpooled, [B, D]
    gweights,  # da, [B, M, D]
    xs,  # M of [B, D]
    presence,  # [B, M] or None
    weights,  # a, [B, M, D]
    denergies,  # de, [B, M, D]
    batch,
    features,
    g_row,
    gweights_row,
    gweights_modality,
    x_row,
    presence_row,
    presence_modality,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, n, n_inside = _tile(batch, features, BLOCK_M, BLOCK_N)
    inside = (row < batch)[:, None] & n_inside
    dpooled = _load(g, row, n, g_row, inside)
    mean = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for walk in tl.static_range(2):
        for i in range(0, len(xs)):
            here = present(presence, row < batch, row, i, presence_row, presence_modality)[:, None]
            share = _load(weights + i * features, row, n, len(xs) * features, here & n_inside)
            slope = _load(gweights + i * gweights_modality, row, n, gweights_row, here & n_inside)
            slope += dpooled * _load(pick(xs, tl.cast(i, tl.int32)), row, n, x_row, here & n_inside)
            if walk == 0:
                mean += tl.where(here, share * slope, 0.0)
            else:
                de = tl.where(here, share * (slope - mean), 0.0)
                _store(denergies + i * features, row, n, len(xs) * features, inside, de)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _source_gradients(
    g,  # dpooled, [B, D]
    weights,  # a, [B, M, D]
    dtotal,  # dg, [B, D]
    presence,  # [B, M] or None
    dxs,  # of some modalities, each [B, D]
    which,  # they are
    batch,
    features,
    modalities,
    g_row,
    presence_row,
    presence_modality,
    dx_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, n, n_inside = _tile(batch, features, BLOCK_M, BLOCK_N)
    inside = (row < batch)[:, None] & n_inside
    dpooled = _load(g, row, n, g_row, inside)
    shared = _load(dtotal, row, n, features, inside)
    for j in range(0, len(dxs)):
        i = number(pick(which, tl.cast(j, tl.int32)))
        here = present(presence, row < batch, row, i, presence_row, presence_modality)[:, None]
        share = _load(weights + i * features, row, n, modalities * features, here & n_inside)
        dx = tl.where(here, share * dpooled + shared, 0.0)
        _store(pick(dxs, tl.cast(j, tl.int32)), row, n, dx_row, inside, dx)


# --- launches ---------------------------------------------------------------------------------------------------------

_TILES = Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    xs, weight1, bias1, weight2, bias2, activation, presence = a
    views = modalities(xs)
    count, (batch, features) = len(views), views[0].shape
    flags, *flag_strides = presence_flags(presence, batch, count)
    grid, strides = (tiles(_TILES, batch, features),), (views[0].stride(0), *flag_strides)
    total = weight1.new_empty((batch, features))
    launch(_sum, grid, views, flags, total, batch, features, *strides, config=_TILES)
    z, preactivation = linear.forward(LinearArguments([total], weight1, bias1, activation), training)
    energies, _ = linear.forward(LinearArguments([z], weight2, bias2), False)
    pooled, weights = total.new_empty(total.shape), total.new_empty((batch, count, features))
    launch(_pool, grid, views, energies, flags, pooled, weights, batch, features, *strides, config=_TILES)
    if training:
        return pooled, weights, total, z, preactivation
    return pooled, weights, total.new_empty(0), total.new_empty(0), preactivation


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, weight1, bias1, weight2, bias2, activation, presence = a
    (g, gweights), (_, weights, total, z, preactivation) = grads, saved
    views = modalities(xs)
    count, (batch, features) = len(views), views[0].shape
    of_xs, (of_weight1, of_bias1, of_weight2, of_bias2, _) = needed[: len(xs)], needed[len(xs) :]
    flags, *flag_strides = presence_flags(presence, batch, count)
    grid = (tiles(_TILES, batch, features),)
    denergies = g.new_empty((batch, count * features))
    launch(
        _energy_gradients,
        grid,
        *(g, gweights, views, flags, weights, denergies, batch, features),
        *(g.stride(0), gweights.stride(0), gweights.stride(1), views[0].stride(0), *flag_strides),
        config=_TILES,
    )
    wanted = (any((*of_xs, of_weight1, of_bias1)), of_weight2, of_bias2, False, False, False)
    dz, dweight2, dbias2, *_ = linear.backward([denergies], LinearArguments([z], weight2, bias2), [], wanted)
    dtotal, dweight1, dbias1 = (g.new_empty(0) for _ in range(3))
    dxs = [x.new_empty(x.shape if n else 0) for x, n in zip(xs, of_xs, strict=True)]
    if wanted[0]:
        kept = preactivation if preactivation.numel() else z
        wanted = (any(of_xs), of_weight1, of_bias1, False, False, False)
        dtotal, dweight1, dbias1, *_ = linear.backward(
            [dz], LinearArguments([total], weight1, bias1, activation), [kept], wanted
        )
    if any(of_xs):
        parts, which, dx_row = needed_modalities(xs, dxs, of_xs)
        launch(
            _source_gradients,
            grid,
            *(g, weights, dtotal, flags, parts, which, batch, features, count),
            *(g.stride(0), *flag_strides, dx_row),
            config=_TILES,
        )
    return [*dxs, dweight1, dbias1, dweight2, dbias2, g.new_empty(0)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Branches of feature maps and a list of modalities, some absent."""
    import mmkernels as mmk

    def call(xs: Tensor | list[Tensor], hidden: int, **options: Any) -> Any:
        count, width = xs.shape[1:] if isinstance(xs, Tensor) else (len(xs), xs[0].shape[1])
        layers = new(hidden, width), new(hidden), new(count * width, hidden), new(count * width)
        return mmk.split_attention_pool(xs, *layers, **options)

    yield "2x4096x512 to 64, relu, stacked", lambda: call(new(4096, 2, 512), 64)
    yield (
        "3x256x768 to 96, gelu, presence",
        lambda: call([new(256, 768) for _ in range(3)], 96, activation="gelu", presence=new(256, 3, dtype=torch.bool)),
    )
