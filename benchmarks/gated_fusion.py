"""gated_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch cat, linears, gates"


@dataclass(frozen=True)
class Shape:
    """Rows, widths of the modalities, output features; the sigmoid form or the softmax over modalities."""

    note: str
    rows: int
    widths: tuple[int, ...]
    features: int
    sigmoid: bool = False

    def __str__(self) -> str:
        form = "sigmoid" if self.sigmoid else "softmax"
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features} {form}"

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def gates(self) -> int:
        return self.features * (1 if self.sigmoid else len(self.widths))


SHAPES = (
    Shape("MM-IMDb: plot and poster", 64, (300, 4096), 512, sigmoid=True),
    Shape("pooled image and text encoders", 256, (768, 512), 512, sigmoid=True),
    Shape("tokens of two encoders", 1024, (512, 512), 256, sigmoid=True),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 256),
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128),
)
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128),
    Shape("one utterance, two modalities", 1, (128, 32), 64, sigmoid=True),
    Shape("a batch of utterances, narrow", 16, (20, 20), 32, sigmoid=True),
)


def plain(*leaves: Tensor, count: int, sigmoid: bool) -> Tensor:
    xs, weights, biases = (leaves[i * count : (i + 1) * count] for i in range(3))
    gate_weight, gate_bias = leaves[3 * count :]
    values = [torch.tanh(F.linear(x, w, b)) for x, w, b in zip(xs, weights, biases, strict=True)]
    gates = F.linear(torch.cat(xs, -1), gate_weight, gate_bias)
    if sigmoid:
        z = torch.sigmoid(gates)
        return z * values[0] + (1 - z) * values[1]
    shares = gates.unflatten(-1, (count, -1)).softmax(-2)
    return (shares * torch.stack(values, -2)).sum(-2)


def ours(*leaves: Tensor, count: int) -> Tensor:
    xs, weights, biases = (leaves[i * count : (i + 1) * count] for i in range(3))
    return mmk.gated_fusion(xs, weights, biases, *leaves[3 * count :])


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    count = len(shape.widths)
    tensors = [torch.randn(shape.rows, k) for k in shape.widths]
    tensors += [torch.randn(shape.features, k) * k**-0.5 for k in shape.widths]
    tensors += [torch.randn(shape.features) for _ in shape.widths]
    tensors += [torch.randn(shape.gates, shape.width) * shape.width**-0.5, torch.randn(shape.gates)]
    names = [f"{name}[{i}]" for name in ("xs", "value_weights", "value_biases") for i in range(count)]
    baseline = partial(plain, count=count, sigmoid=shape.sigmoid)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=(*names, "gate_weight", "gate_bias"),
        ours=partial(ours, count=count),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    """The products alone: every modality by its own weight, all of them by the gates'."""
    return (6.0 if training else 2.0) * shape.rows * shape.width * (shape.features + shape.gates)


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: inputs, weights, output. Training also: inputs, weights and the output's gradient read, gradients
    written."""
    inputs = (shape.rows + shape.features + shape.gates) * shape.width
    output = shape.rows * shape.features
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
