"""bilinear_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "two linears, product"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    x_width: int
    y_width: int
    outputs: int
    rank: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.x_width}*{self.y_width} n{self.outputs} r{self.rank}"


SHAPES = (
    Shape("one image, one question", 1, 1024, 768, 200, 5),
    Shape("sentiment, a small batch", 32, 300, 74, 64, 1),
    Shape("image and question, a small batch", 32, 2048, 1024, 1000, 1),
    Shape("pooled windows", 256, 512, 512, 256, 5),
    Shape("image and question", 256, 2048, 1024, 1000, 1),
    Shape("image regions and question", 512, 1024, 768, 200, 5),
)


def eager(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, *, rank: int) -> Tensor:
    z = F.linear(x, x_weight) * F.linear(y, y_weight)
    return z if rank == 1 else z.view(z.shape[0], -1, rank).sum(-1)


def ours(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, *, rank: int) -> Tensor:
    return mmk.bilinear_fusion(x, y, x_weight, y_weight, rank=rank)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    rows = shape.outputs * shape.rank
    leaves = (
        torch.randn(shape.batch, shape.x_width),
        torch.randn(shape.batch, shape.y_width),
        torch.randn(rows, shape.x_width) / shape.x_width**0.5,
        torch.randn(rows, shape.y_width) / shape.y_width**0.5,
    )
    plain = partial(eager, rank=shape.rank)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in leaves),
        names=("x", "y", "x_weight", "y_weight"),
        ours=partial(ours, rank=shape.rank),
        torch=plain,
        eager=plain,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and writes every gradient."""
    inputs = (shape.batch + shape.outputs * shape.rank) * (shape.x_width + shape.y_width)
    outputs = shape.batch * shape.outputs
    return itemsize * float(3 * inputs + 2 * outputs if training else inputs + outputs)


def case(shape: Shape, *, training: bool) -> Case:
    product = 2 * shape.batch * shape.outputs * shape.rank * (shape.x_width + shape.y_width)
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=float(3 * product if training else product),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    return [case(shape, training=training) for training in (False, True) for shape in SHAPES]
