"""Attention to few keys on NVIDIA GPUs, in CUDA C++: what cross_attention and joint_attention share of it.

The kernels are csrc/attention/short_key_*_cuda.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels._cuda import Library, aligned, has_warpgroup_products, misaligned, shared_memory

_STEP = 16  # of keys
_WARPS = 4  # of a block of the forward and of dQ
_TILE = 32  # queries that pass through the shared memory of a block of dK and dV
_MOST_KEYS = 512
_MOST_BLOCKS = 65535  # along the second and third dim of a grid
_BLOCKS = 1056  # eight for each multiprocessor of a large GPU
_SUMMING_BLOCKS = 264  # two, as many as are there at a time: each share of the queries has sums to write and to add up


@dataclass(frozen=True)
class ShortKeys:
    """What queries attend to, and how."""

    keys: Sequence[Tensor]  # segments, [B, Hkv, Lk, D] each
    values: Sequence[Tensor]
    lengths: Sequence[Tensor]  # [B] int64 of each padded segment
    padded: Sequence[int]
    scale: float
    bias: Tensor | None = None  # [Hq, segments] float32
    mask: Tensor | None = None  # [1|B, 1|Hq, 1|Lq, 1|Lk] bool, float32 or the queries' dtype

    @property
    def total(self) -> int:
        return sum(k.shape[2] for k in self.keys)

    def arguments(self, query: Tensor, tiles: int) -> tuple[Any, ...]:
        """Of every kernel, before its own."""
        mask = self.mask
        if mask is not None:
            mask = mask.expand(*query.shape[:3], self.total)
        lengths = [x.contiguous() for x in self.lengths]
        segments = list(self.keys), list(self.values), lengths, list(self.padded)
        return (query, *segments, self.bias, mask, self.scale, tiles)


@dataclass(frozen=True)
class Queries:
    """A stream of queries and what its forward left."""

    query: Tensor  # [B, Hq, Lq, D]
    grad_out: Tensor
    out: Tensor
    row_max: Tensor  # [B, Hq, Lq] float32
    log_sum: Tensor
    grad_log_sum: Tensor | None


def declines(queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], backward: bool) -> str | None:
    """Why the kernels cannot serve these tensors, or None."""
    dim, value_dim, total = queries[0].shape[3], values[0].shape[3], sum(k.shape[2] for k in keys)
    if dim != value_dim or dim % 8 or not 8 <= dim <= 256:
        return f"head dims {dim} and {value_dim}: its kernel takes one multiple of 8 up to 256"
    batch, heads = queries[0].shape[:2]
    if max(batch, heads * _ceil_div(total, 64)) > _MOST_BLOCKS:
        return f"batch {batch} and {heads} heads: the blocks of its kernels go up to {_MOST_BLOCKS} in these dims"
    if not 0 < total <= _MOST_KEYS:
        return f"{total} keys: its kernel takes 1 to {_MOST_KEYS}"
    needed, present = _shared_bytes(dim, total, backward), shared_memory(queries[0].device)
    if needed > present:
        return f"{total} keys with head dim {dim} need {needed} bytes of shared memory, more than {present}"
    return misaligned(*queries, *keys, *values)


def _shared_bytes(dim: int, total: int, backward: bool) -> int:
    """Keys, values and what is added to their scores; two tiles of queries for each warp, with their dO backward."""
    padded = next(d for d in (32, 64, 96, 128, 256) if d >= dim)
    keys = _ceil_div(total, _STEP) * _STEP
    return keys * (4 * padded + 4) + _WARPS * 2 * _STEP * padded * 2 * (2 if backward else 1)


def loses(keys: Sequence[Tensor]) -> str | None:
    """Why another kernel is faster: with more keys, products that Hopper's own instructions do twice as fast.

    Reading Q and writing O take as long as 163 keys on an H100 (3.0 TB/s, some 490 TFLOP/s by mma.sync).
    """
    total = sum(k.shape[2] for k in keys)
    if total > 192 and has_warpgroup_products(keys[0].device):
        return f"{total} keys are more than the 192 up to which it is the faster"
    return None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(query: Tensor, rows: int, blocks: int = _BLOCKS) -> int:
    """Tiles of so many queries for a block, so that there are up to so many blocks and keys are seldom loaded again."""
    batch, heads, length, _ = query.shape
    shares = max(blocks // max(batch * heads, 1), 1)
    return max(_ceil_div(_ceil_div(length, rows), shares), 1)


def attend(
    kernels: Library, query: Tensor, attention: ShortKeys, out: Tensor, statistics: tuple[Tensor, Tensor] | None
) -> None:
    """Fill ``out`` [B, Hq, Lq, D] and, where they are wanted, row_max and log_sum [B, Hq, Lq]."""
    if query.numel():
        arguments = attention.arguments(query, _tiles(query, _WARPS * _STEP))
        kernels("short_key_attention", *arguments, out, *(statistics or (None, None)))


def query_gradient(
    kernels: Library,
    stream: Queries,
    attention: ShortKeys,
    dquery: Tensor | None,
    dscores: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """Fill dQ and dS [B, Hq, Lq, keys] where they are wanted; returns Δ, which the other gradients start from.

    ``exact`` where sums of dS are wanted, in which the rounding of O would not cancel.
    """
    deltas = torch.empty_like(stream.row_max)
    if stream.query.numel():
        grad_log_sum = None if stream.grad_log_sum is None else stream.grad_log_sum.contiguous()
        of_stream = (aligned(stream.grad_out), stream.out, stream.row_max, stream.log_sum, grad_log_sum)
        arguments = attention.arguments(stream.query, _tiles(stream.query, _WARPS * _STEP))
        kernels("short_key_attention_query_gradient", *arguments, *of_stream, deltas, dquery, dscores, exact)
    return deltas


def gradients(
    kernels: Library,
    streams: Sequence[Queries],
    deltas: Sequence[Tensor],
    attentions: Sequence[ShortKeys],
    dkeys: Sequence[Tensor | None],
    dvalues: Sequence[Tensor | None],
    with_bias: bool,
) -> list[Tensor]:
    """Fill dK and dV of each segment where they are wanted, summed over streams of queries.

    Returns the gradient of each stream's bias, [Hq, segments], where ``with_bias``.
    """
    first, attention = streams[0].query, attentions[0]
    batch, heads, _, dim = first.shape
    total = _ceil_div(attention.total, _STEP) * _STEP
    blocks_of_keys = _ceil_div(total, 64 if dim > 128 else 128)
    tiles = [_tiles(s.query, _TILE, _SUMMING_BLOCKS // blocks_of_keys) for s in streams]
    shares = [_ceil_div(s.query.shape[2], _TILE * t) for s, t in zip(streams, tiles, strict=True)]

    def sums(wanted: bool, *size: int) -> Tensor | None:
        shape = (sum(shares), batch, heads, total, *size)
        return first.new_empty(shape, dtype=torch.float32) if wanted else None

    of_keys, of_values = (sums(any(t is not None for t in ts), dim) for ts in (dkeys, dvalues))
    of_added = sums(with_bias)
    at = 0
    for stream, delta, of_stream, count, share in zip(streams, deltas, attentions, tiles, shares, strict=True):
        if stream.query.numel():
            given = (aligned(stream.grad_out), stream.row_max, stream.log_sum, delta)
            arguments = of_stream.arguments(stream.query, count)
            kernels("short_key_attention_gradients", *arguments, *given, of_keys, of_values, of_added, at)
        at += share
    begin = 0
    for key, dkey, dvalue in zip(attention.keys, dkeys, dvalues, strict=True):
        for of_all, out, factor in ((of_keys, dkey, attention.scale), (of_values, dvalue, 1.0)):
            if of_all is not None and out is not None and out.numel():
                kernels("short_key_attention_total", of_all, out, begin, factor)
        begin += key.shape[2]
    if of_added is None:
        return []
    lengths = [key.shape[2] for key in attention.keys]
    by_segment = [part.sum((1, 3)) for part in of_added[..., : attention.total].split(lengths, 3)]
    return [part.sum(0) for part in torch.stack(by_segment, -1).split(shares)]
