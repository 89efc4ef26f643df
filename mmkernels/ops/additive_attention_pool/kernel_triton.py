"""additive_attention_pool on GPUs.

    t_i = tanh(x_i Wᵀ + q W_qᵀ + b),  e_i = v · t_i,  a = softmax over present i of e,  pooled = Σ_i a_i x_i
    s_i = dpooled · x_i + da_i,  de_i = a_i (s_i − Σ_j a_j s_j),  du_i = de_i · v ∘ (1 − t_i²)
    dx_i = a_i dpooled + du_i W,  dW = Σ_i du_iᵀ x_i,  dv = Σ de_i t_i,  db = Σ du_i

Tiling     Forward: a program owns a tile of rows and hidden features of one modality; tanh and the product with v are
           taken on the tile, whose part of e is all that it writes, and t in training. A pass over tiles of pooled then
           takes the softmax and reads each modality once. Backward: de in a pass over the rows; du, its sum over the
           modalities and the sums over rows in one over tiles of hidden features; dx_i, a program owning rows and
           columns of it; dW, a program owning features and columns and a share of the rows of every modality, which
           torch adds up in their order. A block of rows none of which has a modality skips it. q W_qᵀ + b and its
           gradients are concat_linear's.
Precision  sums, e and de in float32; t, du and q W_qᵀ + b rounded to the inputs' dtype.
Limits     up to 64 modalities. An absent one is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.additive_attention_pool.op import Arguments
from mmkernels.ops.concat_linear import kernel_triton as linear
from mmkernels.ops.concat_linear.op import Arguments as LinearArguments
from mmkernels.triton.launch import Config, ceil_div, dot_precision, launch, next_power_of_2, tiles
from mmkernels.triton.math import number, pick, tanh
from mmkernels.triton.pool import modalities, needed_modalities, presence_flags, present


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _energies(
    xs,  # M of [B, D]
    weight,  # [A, D]
    shift,  # q W_qᵀ + b, [B, A], or [A], or None
    vector,  # [A]
    presence,  # [B, M] or None
    activations,  # t, [B, M·A], or None
    energies,  # [hidden blocks, B, M] float32
    batch,
    features,  # D
    hidden,  # A
    x_row,  # strides
    weight_row,
    shift_row,  # 0 where it is one for all rows
    presence_row,
    presence_modality,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(hidden, BLOCK_N)
    block = tl.program_id(0) % blocks
    i = tl.program_id(1)
    count = tl.num_programs(1)
    row = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < hidden
    here = present(presence, row < batch, row, i, presence_row, presence_modality)
    end = tl.where(tl.max(here.to(tl.int32), 0) > 0, features, 0)
    x_at = pick(xs, i) + row.to(tl.int64)[:, None] * x_row
    weight_at = weight + n.to(tl.int64)[:, None] * weight_row
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_at + k, mask=here[:, None] & (k < features), other=0.0)
        w = tl.load(weight_at + k, mask=n_inside[:, None] & (k < features), other=0.0)
        acc += tl.dot(x, tl.trans(w), input_precision=PRECISION)
    inside = (row < batch)[:, None] & n_inside[None, :]
    if shift is not None:
        shift_at = shift + row.to(tl.int64)[:, None] * shift_row + n[None, :]
        acc += tl.load(shift_at, mask=inside, other=0.0).to(tl.float32)
    t = tanh(acc)
    if activations is not None:
        at = (row.to(tl.int64) * count + i)[:, None] * hidden + n[None, :]
        tl.store(activations + at, t.to(activations.dtype.element_ty), mask=inside)
    v = tl.load(vector + n, mask=n_inside, other=0.0).to(tl.float32)
    energy_at = (block.to(tl.int64) * batch + row) * count + i
    tl.store(energies + energy_at, tl.sum(t * v[None, :], 1), mask=row < batch)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _pool(
    xs,  # M of [B, D]
    energies,  # [hidden blocks, B, M]
    presence,  # [B, M] or None
    pooled,  # [B, D]
    weights,  # [B, M]
    batch,
    features,
    blocks,
    x_row,
    presence_row,
    presence_modality,
    MODALITIES: tl.constexpr,  # M or more
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m = tl.arange(0, MODALITIES)[None, :]
    owned = (row < batch)[:, None] & (m < len(xs))
    at = row.to(tl.int64)[:, None] * len(xs) + m
    energy = tl.zeros([BLOCK_M, MODALITIES], tl.float32)
    for block in range(0, blocks):
        energy += tl.load(energies + tl.cast(block, tl.int64) * batch * len(xs) + at, mask=owned, other=0.0)
    there = present(presence, owned, row[:, None], m, presence_row, presence_modality)
    energy = tl.where(there, energy, -float("inf"))
    top = tl.max(energy, 1)
    share = tl.exp(energy - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(share, 1)
    share /= tl.where(total == 0.0, 1.0, total)[:, None]
    if tl.program_id(1) == 0:
        tl.store(weights + at, share.to(weights.dtype.element_ty), mask=owned)
    mixed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, len(xs)):
        here = present(presence, row < batch, row, i, presence_row, presence_modality)
        x_at = pick(xs, tl.cast(i, tl.int32)) + row.to(tl.int64)[:, None] * x_row + n
        x = tl.load(x_at, mask=here[:, None] & (n < features), other=0.0).to(tl.float32)
        mixed += tl.sum(tl.where(m == i, share, 0.0), 1)[:, None] * x
    pooled_at = pooled + row.to(tl.int64)[:, None] * features + n
    tl.store(pooled_at, mixed.to(pooled.dtype.element_ty), mask=(row < batch)[:, None] & (n < features))


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _energy_gradients(
    g,  # dpooled, [B, D]
    gweights,  # [B, M]
    xs,  # M of [B, D]
    presence,  # [B, M] or None
    weights,  # [B, M]
    denergies,  # [B, M] float32
    batch,
    features,
    g_row,
    gweights_row,
    x_row,
    presence_row,
    presence_modality,
    MODALITIES: tl.constexpr,  # M or more
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.arange(0, MODALITIES)[None, :]
    owned = (row < batch)[:, None] & (m < len(xs))
    there = present(presence, owned, row[:, None], m, presence_row, presence_modality)
    slopes = tl.load(gweights + row.to(tl.int64)[:, None] * gweights_row + m, mask=there, other=0.0).to(tl.float32)
    for i in range(0, len(xs)):
        here = present(presence, row < batch, row, i, presence_row, presence_modality)
        x_at = pick(xs, tl.cast(i, tl.int32)) + row.to(tl.int64)[:, None] * x_row
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, features, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[None, :]
            inside = here[:, None] & (n < features)
            x = tl.load(x_at + n, mask=inside, other=0.0).to(tl.float32)
            products += x * tl.load(g + row.to(tl.int64)[:, None] * g_row + n, mask=inside, other=0.0).to(tl.float32)
        slopes += tl.where(m == i, tl.sum(products, 1)[:, None], 0.0)
    at = row.to(tl.int64)[:, None] * len(xs) + m
    share = tl.load(weights + at, mask=there, other=0.0).to(tl.float32)
    de = share * (slopes - tl.sum(share * slopes, 1)[:, None])
    tl.store(denergies + at, tl.where(there, de, 0.0), mask=owned)


@triton.jit(do_not_specialize=["batch"])
def _hidden_gradients(
    denergies,  # [B, M]
    activations,  # t, [B, M·A]
    vector,  # [A]
    du,  # [B, M·A]
    total,  # Σ_i du_i, [B, A], or None
    dvector,  # [row blocks, A] float32 or None
    dbias,  # [row blocks, A] float32 or None
    batch,
    hidden,  # A
    modalities,  # M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.cdiv(hidden, BLOCK_N)
    block = tl.program_id(0) // columns
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < batch)[:, None] & (n < hidden)[None, :]
    v = tl.load(vector + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * (modalities * hidden) + n[None, :]
    over_modalities = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    of_vector = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, modalities):
        de = tl.load(denergies + row.to(tl.int64) * modalities + i, mask=row < batch, other=0.0)[:, None]
        t = tl.load(activations + at + i * hidden, mask=inside, other=0.0).to(tl.float32)
        d = de * v * (1.0 - t * t)
        tl.store(du + at + i * hidden, d.to(du.dtype.element_ty), mask=inside)
        over_modalities += d
        of_vector += de * t
    if total is not None:
        total_at = total + row.to(tl.int64)[:, None] * hidden + n[None, :]
        tl.store(total_at, over_modalities.to(total.dtype.element_ty), mask=inside)
    sum_at = block.to(tl.int64) * hidden + n
    if dvector is not None:
        tl.store(dvector + sum_at, tl.sum(of_vector, 0), mask=n < hidden)
    if dbias is not None:
        tl.store(dbias + sum_at, tl.sum(over_modalities, 0), mask=n < hidden)


@triton.jit(do_not_specialize=["batch", "presence_row", "presence_modality"])
def _input_gradients(
    g,  # dpooled, [B, D]
    weights,  # [B, M]
    du,  # [B, M·A]
    weight,  # [A, D]
    presence,  # [B, M] or None
    dxs,  # of some modalities, each [B, D]
    which,  # they are
    batch,
    features,  # D
    hidden,  # A
    modalities,  # M
    g_row,
    weight_row,
    presence_row,
    presence_modality,
    dx_row,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    i = number(pick(which, tl.program_id(1)))
    row = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    here = present(presence, row < batch, row, i, presence_row, presence_modality)
    end = tl.where(tl.max(here.to(tl.int32), 0) > 0, hidden, 0)
    at = row.to(tl.int64) * modalities + i
    du_at = du + at[:, None] * hidden
    weight_at = tl.arange(0, BLOCK_K)[:, None] * weight_row + n  # in 32 bits from a block's first row on
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        d = tl.load(du_at + k[None, :], mask=here[:, None] & (k < hidden)[None, :], other=0.0)
        weight_block = weight + tl.cast(start, tl.int64) * weight_row
        w = tl.load(weight_block + weight_at, mask=(k < hidden)[:, None] & (n < features), other=0.0)
        acc += tl.dot(d, w, input_precision=PRECISION)
    share = tl.load(weights + at, mask=here, other=0.0).to(tl.float32)
    g_at = g + row.to(tl.int64)[:, None] * g_row + n
    acc += share[:, None] * tl.load(g_at, mask=here[:, None] & (n < features), other=0.0).to(tl.float32)
    dx_at = pick(dxs, tl.program_id(1)) + row.to(tl.int64)[:, None] * dx_row + n
    tl.store(dx_at, acc.to(g.dtype.element_ty), mask=(row < batch)[:, None] & (n < features))


@triton.jit(do_not_specialize=["batch", "share", "presence_row", "presence_modality"])
def _weight_gradient(
    du,  # [B, M·A]
    xs,  # M of [B, D]
    presence,  # [B, M] or None
    dweight,  # [shares, A, D] float32
    batch,
    features,  # D
    hidden,  # A
    share,  # rows of a program
    x_row,
    presence_row,
    presence_modality,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    a = tl.program_id(0) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * share
    du_row = len(xs) * hidden
    du_at = tl.arange(0, BLOCK_K)[:, None] * du_row + a[None, :]  # in 32 bits from a block's first row on
    x_at = tl.arange(0, BLOCK_K)[:, None] * x_row + n[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, len(xs)):
        x = pick(xs, tl.cast(i, tl.int32))
        for start in range(begin, tl.minimum(begin + share, batch), BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            here = present(presence, row < batch, row, i, presence_row, presence_modality)[:, None]
            du_block = du + i * hidden + tl.cast(start, tl.int64) * du_row
            d = tl.load(du_block + du_at, mask=here & (a < hidden)[None, :], other=0.0)
            x_block = x + tl.cast(start, tl.int64) * x_row
            b = tl.load(x_block + x_at, mask=here & (n < features)[None, :], other=0.0)
            acc += tl.dot(tl.trans(d), b, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * hidden + a[:, None]) * features + n[None, :]
    tl.store(dweight + at, acc, mask=(a < hidden)[:, None] & (n < features)[None, :])


# --- launches ---------------------------------------------------------------------------------------------------------

_TILES = Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=8)  # of the passes without a product


def _row_config(features: int, itemsize: int) -> Config:
    """Eight elements per thread of every tile, which float32 has half as many of."""
    block = min(max(next_power_of_2(features), 32), 512)
    halves = itemsize == 2
    return Config({"BLOCK_M": (1024 if halves else 512) // block, "BLOCK_N": block}, 4 if halves else 2, 1)


def _weight_config(x: Tensor, hidden: int) -> Config:
    """Blocks half as deep as concat_linear's: the walk over the modalities takes registers of its own."""
    size = {"BLOCK_M": 16 if hidden <= 16 else 64, "BLOCK_N": 64}
    if x.dtype == torch.float32:
        return Config({**size, "BLOCK_K": 16}, 8, 2)
    return Config({**size, "BLOCK_K": 32}, 4, 3)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    xs, weight, vector, bias, query, query_weight, presence = a
    views = modalities(xs)
    count, (batch, features), hidden = len(views), views[0].shape, weight.shape[0]
    shift = bias
    if query is not None and query_weight is not None:
        shift, _ = linear.forward(LinearArguments([query], query_weight, bias), False)
    flags, *flag_strides = presence_flags(presence, batch, count)
    activations = weight.new_empty((batch, count * hidden) if training else 0)
    config = linear._config(weight, batch, hidden)
    blocks = ceil_div(hidden, config.constants["BLOCK_N"])
    energies = weight.new_empty((blocks, batch, count), dtype=torch.float32)
    launch(
        _energies,
        (tiles(config, batch, hidden), count),
        *(views, weight, shift, vector, flags, activations if training else None, energies, batch, features, hidden),
        *(views[0].stride(0), weight.stride(0), shift.stride(0) if shift is not None and shift.dim() == 2 else 0),
        *flag_strides,
        PRECISION=dot_precision(weight),
        config=config,
    )
    pooled, weights = weight.new_empty((batch, features)), weight.new_empty((batch, count))
    rows, columns = _TILES.constants["BLOCK_M"], _TILES.constants["BLOCK_N"]
    launch(
        _pool,
        (ceil_div(batch, rows), max(ceil_div(features, columns), 1)),
        *(views, energies, flags, pooled, weights, batch, features, blocks, views[0].stride(0), *flag_strides),
        MODALITIES=next_power_of_2(count),
        config=_TILES,
    )
    return pooled, weights, activations


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    xs, weight, vector, _, query, query_weight, presence = a
    (g, gweights), (_, weights, activations) = grads, saved
    views = modalities(xs)
    count, (batch, features), hidden = len(views), views[0].shape, weight.shape[0]
    of_xs, (of_weight, of_vector, of_bias, of_query, of_query_weight, _) = needed[: len(xs)], needed[len(xs) :]
    flags, *flag_strides = presence_flags(presence, batch, count)
    denergies = g.new_empty((batch, count), dtype=torch.float32)
    config = _row_config(features, xs[0].element_size())
    launch(
        _energy_gradients,
        (ceil_div(batch, config.constants["BLOCK_M"]),),
        *(g, gweights, views, flags, weights, denergies, batch, features),
        *(g.stride(0), gweights.stride(0), views[0].stride(0), *flag_strides),
        MODALITIES=next_power_of_2(count),
        config=config,
    )
    du = torch.empty_like(activations)
    total = g.new_empty((batch, hidden)) if of_query or of_query_weight else None
    row_blocks = ceil_div(batch, _TILES.constants["BLOCK_M"])
    dvector, dbias = (denergies.new_empty((row_blocks, hidden)) if n else None for n in (of_vector, of_bias))
    launch(
        _hidden_gradients,
        (tiles(_TILES, batch, hidden),),
        *(denergies, activations, vector, du, total, dvector, dbias, batch, hidden, count),
        config=_TILES,
    )
    dxs = [x.new_empty(x.shape if n else 0) for x, n in zip(xs, of_xs, strict=True)]
    parts, which, dx_row = needed_modalities(xs, dxs, of_xs)
    config = linear._config(weight, batch, features)
    launch(
        _input_gradients,
        (tiles(config, batch, features), len(parts)),
        *(g, weights, du, weight, flags, parts, which, batch, features, hidden, count),
        *(g.stride(0), weight.stride(0), *flag_strides, dx_row),
        PRECISION=dot_precision(weight),
        config=config,
    )
    dweight = _dweight(du, views, hidden, flags, flag_strides) if of_weight else None
    dvector, dbias = (None if t is None else t.sum(0).to(g.dtype) for t in (dvector, dbias))
    dquery = dquery_weight = None
    if total is not None and query is not None and query_weight is not None:
        wanted = (of_query, of_query_weight, False, False, False, False)
        dquery, dquery_weight, *_ = linear.backward([total], LinearArguments([query], query_weight), [], wanted)
    others = (dweight, dvector, dbias, dquery, dquery_weight, None)
    return [*dxs, *(g.new_empty(0) if t is None else t for t in others)]


def _dweight(
    du: Tensor, views: tuple[Tensor, ...], hidden: int, flags: Tensor | None, flag_strides: Sequence[int]
) -> Tensor:
    batch, features = views[0].shape
    config = _weight_config(du, hidden)
    count, step = tiles(config, hidden, features), config.constants["BLOCK_K"]
    shares = max(min(linear._PROGRAMS // max(count, 1), ceil_div(batch, 8 * step)), 1)
    share = max(ceil_div(ceil_div(batch, shares), step) * step, step)
    shares = max(ceil_div(batch, share), 1)
    dweight = du.new_empty((shares, hidden, features), dtype=torch.float32)
    launch(
        _weight_gradient,
        (count, shares),
        *(du, views, flags, dweight, batch, features, hidden, share, views[0].stride(0), *flag_strides),
        PRECISION=dot_precision(du),
        config=config,
    )
    return dweight.sum(0).to(du.dtype)


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each of the products' configurations."""
    import mmkernels as mmk

    def call(xs: Tensor | list[Tensor], hidden: int, **options: Any) -> Any:
        width = (xs if isinstance(xs, Tensor) else xs[0]).shape[-1]
        return mmk.additive_attention_pool(xs, new(hidden, width), new(hidden), bias=new(hidden), **options)

    yield "3x16384x1024 to 1024 stacked", lambda: call(new(16384, 3, 1024), 1024)
    yield (
        "4x512x512 to 128, query, presence",
        lambda: call(
            [new(512, 512) for _ in range(4)],
            128,
            query=new(512, 512),
            query_weight=new(128, 512),
            presence=new(512, 4, dtype=torch.bool),
        ),
    )
    yield "2x16x304 to 16", lambda: call([new(16, 304) for _ in range(2)], 16)
