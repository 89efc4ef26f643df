"""multimodal_cross_entropy: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "weighted sum of F.cross_entropy"


@dataclass(frozen=True)
class Shape:
    """Rows, classes, modalities; features of the hidden states where heads are given instead of logits."""

    note: str
    rows: int
    classes: int
    modalities: int = 3
    features: int = 0

    def __str__(self) -> str:
        size = f"{self.modalities} of {self.rows}x{self.classes}"
        return f"{size} from {self.features}" if self.features else size


SHAPES = (
    Shape("three heads of ImageNet's classes", 1024, 1000),
    Shape("three heads of 8000 classes", 1024, 8000),
    Shape("emotions of utterances", 4096, 7),
    Shape("a vocabulary", 512, 32000, 1),
)
SMALL = (Shape("a small batch", 32, 10),)
HEADS = (Shape("a vocabulary from hidden states", 1024, 16000, 1, 256),)


def _weights(count: int) -> list[float]:
    return [1 / (i + 1) for i in range(count)]


def plain(labels: Tensor, *logits: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits[0].dtype)
    for weight, z in zip(_weights(len(logits)), logits, strict=True):
        total = total + weight * F.cross_entropy(z, labels)
    return total


def ours(labels: Tensor, *logits: Tensor) -> Tensor:
    weights = torch.tensor(_weights(len(logits)), dtype=logits[0].dtype)
    return mmk.multimodal_cross_entropy(logits, labels, weights=weights)[0]


def plain_of_heads(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def ours_of_heads(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return mmk.multimodal_cross_entropy([hidden], labels, linear=[(weight, None)])[0]


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    labels = torch.randint(0, shape.classes, (shape.rows,))
    if shape.features:
        tensors = [torch.randn(shape.rows, shape.features), torch.randn(shape.classes, shape.features) * 0.05]
        names, ours_, plain_ = ("hidden", "weight"), ours_of_heads, plain_of_heads
    else:
        tensors = [torch.randn(shape.rows, shape.classes) for _ in range(shape.modalities)]
        names, ours_, plain_ = tuple(f"logits{i}" for i in range(shape.modalities)), ours, plain
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=names,
        ours=partial(ours_, labels),
        torch=partial(plain_, labels),
        eager=partial(plain_, labels),
    )


def flops(shape: Shape, training: bool) -> float:
    """An exponential counts as one; of a head the products alone."""
    logits = float(shape.modalities * shape.rows * shape.classes)
    return logits * (2 * shape.features or 3) * (3 if training and shape.features else 2 if training else 1)


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Logits read; in training once more, and the gradient written. Of a head its inputs, and their gradients."""
    if shape.features:
        return (2.0 if training else 1.0) * itemsize * shape.features * (shape.rows + shape.classes)
    return (3.0 if training else 1.0) * itemsize * shape.modalities * shape.rows * shape.classes


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
    rows += [case("training from hidden states", s, training=True) for s in HEADS]
    rows += [case("small forward", s) for s in SMALL]
    rows += [case("small training", s, training=True) for s in SMALL]
    return rows
