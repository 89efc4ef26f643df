"""tensor_fusion_linear: what is measured, and against what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "outer product, linear"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    widths: tuple[int, ...]
    outputs: int

    def __str__(self) -> str:
        return f"{self.batch}x{'*'.join(map(str, self.widths))} n{self.outputs}"

    @property
    def features(self) -> int:
        return math.prod(width + 1 for width in self.widths)


SHAPES = (
    Shape("sentiment, one utterance", 1, (20, 5, 74), 64),
    Shape("sentiment, a small batch", 32, (20, 5, 74), 64),
    Shape("three modalities, a small batch", 32, (32, 32, 32), 128),
    Shape("two modalities", 256, (64, 64), 128),
    Shape("three modalities", 256, (32, 32, 32), 128),
    Shape("two modalities, a large batch", 2048, (64, 64), 256),
)


def eager(*leaves: Tensor) -> Tensor:
    """As the paper's code has it: the outer product of the modalities with a 1 in front, then a linear layer."""
    *xs, weight, bias = leaves
    fused = torch.cat([torch.ones_like(xs[0][:, :1]), xs[0]], -1)
    for x in xs[1:]:
        factor = torch.cat([torch.ones_like(x[:, :1]), x], -1)
        fused = torch.einsum("bi,bj->bij", fused, factor).flatten(1)
    return F.linear(fused, weight, bias)


def ours(*leaves: Tensor) -> Tensor:
    *xs, weight, bias = leaves
    return mmk.tensor_fusion_linear(xs, weight, bias)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    xs = [torch.randn(shape.batch, width) for width in shape.widths]
    weight = torch.randn(shape.outputs, shape.features) / shape.features**0.5
    leaves = (*xs, weight, torch.randn(shape.outputs))
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in leaves),
        names=(*(f"x{i}" for i in range(len(xs))), "weight", "bias"),
        ours=ours,
        torch=eager,
        eager=eager,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and writes every gradient."""
    inputs = shape.batch * sum(shape.widths) + shape.outputs * shape.features
    outputs = shape.batch * shape.outputs
    return itemsize * float(3 * inputs + 2 * outputs if training else inputs + outputs)


def case(shape: Shape, *, training: bool) -> Case:
    product = 2 * shape.batch * shape.outputs * shape.features
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
