"""merge_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch logsumexp, weighted sum"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    heads: int
    queries: int
    dim: int
    parts: int = 2

    def __str__(self) -> str:
        return f"{self.parts} of {self.batch}x{self.heads}x{self.queries} d{self.dim}"

    @property
    def rows(self) -> int:
        return self.batch * self.heads * self.queries


SHAPES = (
    Shape("text over image and audio", 2, 8, 77, 64),
    Shape("latents over four sources", 1, 8, 1024, 64, 4),
    Shape("ViT-B/16 patches over two captions", 8, 12, 196, 64),
    Shape("decoding over two caches", 8, 8, 1, 128),
)


def eager(*leaves: Tensor) -> Tensor:
    """As it is written in plain torch."""
    parts = len(leaves) // 2
    lses = torch.stack(leaves[parts:])
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse)
    total = weights[0][..., None] * leaves[0]
    for weight, part in zip(weights[1:], leaves[1:parts], strict=True):
        total = total + weight[..., None] * part
    return total.to(leaves[0].dtype)


def ours(*leaves: Tensor) -> Tensor:
    parts = len(leaves) // 2
    return mmk.merge_attention(leaves[:parts], leaves[parts:])[0]


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    size = (shape.batch, shape.heads, shape.queries)
    outputs = [torch.randn(*size, shape.dim).to(dtype) for _ in range(shape.parts)]
    lses = [torch.randn(size) for _ in range(shape.parts)]
    return Problem(
        leaves=tuple(x.requires_grad_(training) for x in (*outputs, *lses)),
        names=tuple(f"{kind}{i}" for kind in ("out", "lse") for i in range(shape.parts)),
        ours=ours,
        torch=eager,
        eager=eager,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Parts read and the result written; backward: parts and gradient read, a gradient of each part written."""
    rows = float(shape.rows * shape.dim * itemsize)
    return rows * (shape.parts + 1 + (2 * shape.parts + 1 if training else 0))


def case(shape: Shape, *, training: bool) -> Case:
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=float(shape.rows * shape.dim * shape.parts * (6 if training else 2)),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SHAPES[0],
    )


def cases() -> list[Case]:
    return [case(shape, training=training) for training in (False, True) for shape in SHAPES]
