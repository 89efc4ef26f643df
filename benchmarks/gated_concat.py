"""gated_concat: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch cat, linear, gate, cat"


@dataclass(frozen=True)
class Shape:
    """Rows, widths of both modalities; a gate per feature of the first, or one for all."""

    note: str
    rows: int
    widths: tuple[int, int]
    one_gate: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x({self.widths[0]}+{self.widths[1]})" + " one gate" * self.one_gate

    @property
    def gates(self) -> int:
        return 1 if self.one_gate else self.widths[0]


SHAPES = (
    Shape("utterances: GloVe and COVAREP", 64, (300, 74)),
    Shape("pooled text and image encoders", 256, (768, 512)),
    Shape("tokens of two encoders", 4096, (256, 256)),
    Shape("tokens of two encoders", 8192, (256, 256), one_gate=True),
)
SMALL = (
    Shape("one utterance", 1, (300, 74)),
    Shape("one utterance, one gate", 1, (128, 32), one_gate=True),
    Shape("a batch of utterances, narrow", 16, (20, 20)),
)


def plain(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gated = torch.sigmoid(F.linear(torch.cat([x, y], -1), weight, bias)) * x
    return torch.cat([gated, y, gated.sum(-1, keepdim=True)], -1)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    width = sum(shape.widths)
    tensors = [torch.randn(shape.rows, k) for k in shape.widths]
    tensors += [torch.randn(shape.gates, width) * width**-0.5, torch.randn(shape.gates)]
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=("x", "y", "weight", "bias"),
        ours=mmk.gated_concat,
        torch=plain,
        eager=plain,
    )


def flops(shape: Shape, training: bool) -> float:
    """The products alone."""
    return (6.0 if training else 2.0) * shape.rows * sum(shape.widths) * shape.gates


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: inputs, weight, output. Training also: inputs, weight and the output's gradient read, gradients
    written."""
    width = sum(shape.widths)
    inputs = (shape.rows + shape.gates) * width
    output = shape.rows * (width + 1)
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
    rows = [case("forward", s, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("training", s, training=True, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL]
    rows += [case("small training", s, training=True) for s in SMALL]
    return rows
