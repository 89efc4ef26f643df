"""deformable_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch grid_sample, level by level"


@dataclass(frozen=True)
class Shape:
    """Batch, queries, heights and widths of the levels, heads, features of a head, points of a level."""

    note: str
    batch: int
    queries: int
    levels: tuple[tuple[int, int], ...]
    heads: int = 8
    width: int = 32
    points: int = 4

    def __str__(self) -> str:
        return f"{self.batch}x{self.queries}x{self.heads}x{self.width} of {len(self.levels)}x{self.points}"

    @property
    def pixels(self) -> int:
        return sum(h * w for h, w in self.levels)

    @property
    def samples(self) -> int:
        return self.batch * self.queries * self.heads * len(self.levels) * self.points


SHAPES = (
    Shape("Grounding DINO encoder, 512 px", 1, 5440, ((64, 64), (32, 32), (16, 16), (8, 8))),
    Shape("its decoder, 900 queries", 2, 900, ((100, 134), (50, 67), (25, 34), (13, 17))),
    Shape("2500 queries in bird's eye view", 1, 2500, ((58, 100), (29, 50), (15, 25), (8, 13)), points=8),
    Shape("RT-DETR decoder, 300 queries", 2, 300, ((80, 80), (40, 40), (20, 20))),
)
SMALL = (
    Shape("few queries, small maps", 1, 10, ((8, 8), (4, 4)), heads=4),
    Shape("odd sizes", 2, 33, ((17, 5), (1, 9)), heads=3, width=20, points=3),
)


def plain(levels: tuple[tuple[int, int], ...], value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """As the models of transformers have it, but in float32 at least: on the CPU torch's grid_sample of bfloat16 reads
    what is no pixel."""
    dtype, (batch, _, heads, width) = value.dtype, value.shape
    value, locations = (t.to(torch.promote_types(dtype, torch.float32)) for t in (value, locations))
    queries = locations.shape[1]
    sampled = []
    for level, maps in enumerate(value.split([h * w for h, w in levels], 1)):
        maps = maps.flatten(2).transpose(1, 2).reshape(batch * heads, width, *levels[level])
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(sampled, -2).flatten(-2) * shares).sum(-1)
    return out.to(dtype).view(batch, -1, queries).transpose(1, 2)


def ours(levels: tuple[tuple[int, int], ...], value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return mmk.deformable_attention(value, levels, locations, weights)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    size = (shape.batch, shape.queries, shape.heads, len(shape.levels), shape.points)
    tensors = (
        torch.randn(shape.batch, shape.pixels, shape.heads, shape.width),
        torch.rand(*size, 2) * 1.3 - 0.15,  # some beyond the edge
        torch.rand(size).flatten(3).softmax(-1).view(size),
    )
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=("value", "sampling_locations", "attention_weights"),
        ours=partial(ours, shape.levels),
        torch=partial(plain, shape.levels),
        eager=partial(plain, shape.levels),
    )


def flops(shape: Shape, training: bool) -> float:
    """Four corners of every sample: a product and a sum, and in the backward twice as many."""
    return (24.0 if training else 8.0) * shape.samples * shape.width


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: values, locations, weights, output. Training also: these read again with the output's gradient, and
    the gradients written."""
    inputs = shape.batch * shape.pixels * shape.heads * shape.width + 3 * shape.samples
    output = shape.batch * shape.queries * shape.heads * shape.width
    return itemsize * float(3 * inputs + 2 * output if training else inputs + output)


def case(group: str, shape: Shape, *, training: bool = False, quick: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=quick,
    )


def cases() -> list[Case]:
    rows = [case("forward", s, quick=s is SHAPES[-1]) for s in SHAPES]
    rows += [case("training", s, training=True, quick=s is SHAPES[-1]) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL]
    rows += [case("small training", s, training=True) for s in SMALL]
    return rows
