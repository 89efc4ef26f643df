"""split_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "stack, sum, linears, softmax, sum"


@dataclass(frozen=True)
class Shape:
    """Rows, modalities, their width and the hidden features."""

    note: str
    batch: int
    modalities: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.modalities}x{self.width} a{self.hidden}"

    @property
    def elements(self) -> int:
        return self.batch * self.modalities * self.width

    @property
    def weights(self) -> int:
        return (1 + self.modalities) * self.width * self.hidden


SHAPES = (
    Shape("two branches", 4096, 2, 256, 64),
    Shape("text, audio, video encoders", 1024, 3, 512, 128),
    Shape("many views", 256, 16, 1024, 128),
)
SMALL = (
    Shape("one utterance", 1, 3, 300, 64),
    Shape("a batch of utterances, narrow", 64, 4, 20, 32),
)


def plain(*leaves: Tensor, shape: Shape) -> Tensor:
    x = torch.stack(leaves[: shape.modalities], 1)
    weight1, bias1, weight2, bias2 = leaves[shape.modalities :]
    z = F.relu(F.linear(x.sum(1), weight1, bias1))
    return (F.linear(z, weight2, bias2).view(x.shape).softmax(1) * x).sum(1)


def ours(*leaves: Tensor, shape: Shape) -> Tensor:
    return mmk.split_attention_pool(list(leaves[: shape.modalities]), *leaves[shape.modalities :])[0]


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    xs = [torch.randn(shape.batch, shape.width) for _ in range(shape.modalities)]
    energies = shape.modalities * shape.width
    weights = [torch.randn(shape.hidden, shape.width) * shape.width**-0.5, torch.randn(shape.hidden)]
    weights += [torch.randn(energies, shape.hidden) * shape.hidden**-0.5, torch.randn(energies)]
    baseline = partial(plain, shape=shape)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in (*xs, *weights)),
        names=(*(f"xs[{i}]" for i in range(len(xs))), "weight1", "bias1", "weight2", "bias2"),
        ours=partial(ours, shape=shape),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    """The products with both weights."""
    return (6.0 if training else 2.0) * shape.batch * shape.weights


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: modalities and weights read, both outputs written. Training also: all of them and the output's gradient
    read, gradients written."""
    inputs = shape.elements + shape.weights
    pooled = shape.batch * shape.width
    if training:
        return itemsize * float(3 * inputs + 2 * shape.elements + 2 * pooled)
    return itemsize * float(inputs + shape.elements + pooled)


def case(group: str, shape: Shape, *, training: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SMALL[0],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
