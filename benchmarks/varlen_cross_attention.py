"""varlen_cross_attention: what is measured, and against what."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch SDPA by member"


@dataclass(frozen=True)
class Shape:
    """Lengths of the members' queries and keys."""

    note: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    dim: int
    kv_heads: int = 0  # as many as heads

    def __str__(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        return f"{len(self.queries)}x{heads} {_range(self.queries)}x{_range(self.keys)} d{self.dim}"

    @property
    def pairs(self) -> int:
        return self.heads * sum(q * k for q, k in zip(self.queries, self.keys, strict=True))

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads


def _range(lengths: tuple[int, ...]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low}-{high}"


SHAPES = (
    Shape("patches of images of any size, their captions", (196, 50, 640, 12), (32, 77, 5, 400), 8, 64),
    Shape("captions, images of any size", (12, 40, 77, 30, 9, 64), (196, 576, 1024, 256, 729, 400), 12, 64),
    Shape("many short texts, grouped heads", (5, 17, 9, 30) * 8, (16, 49, 25, 36) * 8, 8, 64, 2),
    Shape("decoding over images of any size", (1,) * 6, (196, 576, 1024, 256, 729, 1600), 8, 128),
)


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def ours(*leaves: Tensor, shape: Shape, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    return mmk.varlen_cross_attention(*leaves, cu_q, cu_k, max(shape.queries), max(shape.keys))


def by_member(query: Tensor, key: Tensor, value: Tensor, *, shape: Shape) -> Tensor:
    """As a loop over the members writes it."""
    parts = zip(query.split(shape.queries), key.split(shape.keys), value.split(shape.keys), strict=True)
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), enable_gqa=bool(shape.kv_heads))
        for part in parts
    ]
    return torch.cat([o[0].transpose(0, 1) for o in outs])


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    sizes = [(sum(shape.queries), shape.heads, shape.dim), *[(sum(shape.keys), shape.key_heads, shape.dim)] * 2]
    return Problem(
        leaves=tuple(torch.randn(size).to(dtype).requires_grad_(training) for size in sizes),
        names=("query", "key", "value"),
        ours=partial(ours, shape=shape, cu_q=starts(shape.queries), cu_k=starts(shape.keys)),
        torch=partial(by_member, shape=shape),
        eager=partial(by_member, shape=shape),
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and the output's gradient."""
    query = sum(shape.queries) * shape.heads * shape.dim  # output and its gradient are as large
    keys = 2 * sum(shape.keys) * shape.key_heads * shape.dim
    forward, backward = 2 * query + keys, 4 * query + 2 * keys
    return itemsize * float(forward + backward if training else forward)


def case(shape: Shape, *, training: bool) -> Case:
    """Two products forward, five more backward."""
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=2.0 * shape.pairs * shape.dim * (7 if training else 2),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SHAPES[2],
    )


def cases() -> list[Case]:
    return [case(shape, training=False) for shape in SHAPES] + [case(shape, training=True) for shape in SHAPES[:3]]
