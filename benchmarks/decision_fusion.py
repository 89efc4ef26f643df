"""decision_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "softmax or log_softmax, weighted sum"


@dataclass(frozen=True)
class Shape:
    """Rows, classifiers and classes."""

    note: str
    batch: int
    modalities: int
    classes: int
    method: Literal["mean", "log"] = "mean"

    def __str__(self) -> str:
        return f"{self.method} of {self.modalities}x{self.batch}x{self.classes}"

    @property
    def elements(self) -> int:
        return self.batch * self.modalities * self.classes


SHAPES = (
    Shape("text, audio and video over ImageNet's classes", 4096, 3, 1000),
    Shape("text, audio and video over ImageNet's classes", 4096, 3, 1000, "log"),
    Shape("two models over a vocabulary", 256, 2, 32000, "log"),
)
SMALL = (Shape("emotions of an utterance", 1, 3, 7), Shape("emotions of a batch", 64, 3, 7, "log"))


def plain(*leaves: Tensor, shape: Shape) -> Tensor:
    *logits, weights = leaves
    if shape.method == "mean":
        return sum((w * z.softmax(-1) for w, z in zip(weights, logits, strict=True)), torch.zeros(()))
    return sum((w * z.log_softmax(-1) for w, z in zip(weights, logits, strict=True)), torch.zeros(())).softmax(-1)


def ours(*leaves: Tensor, shape: Shape) -> Tensor:
    return mmk.decision_fusion(leaves[:-1], leaves[-1], method=shape.method)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    logits = [torch.randn(shape.batch, shape.classes) for _ in range(shape.modalities)]
    weights = torch.rand(shape.modalities)
    baseline = partial(plain, shape=shape)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in (*logits, weights / weights.sum())),
        names=(*(f"logits[{i}]" for i in range(shape.modalities)), "weights"),
        ours=partial(ours, shape=shape),
        torch=baseline,
        eager=baseline,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Logits read and probabilities written; backward: logits and their gradient read, gradients written."""
    probabilities = shape.batch * shape.classes
    return itemsize * float(shape.elements + probabilities + (2 * shape.elements + probabilities if training else 0))


def case(group: str, shape: Shape, *, training: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=float(shape.elements * (60 if training else 20)),  # an exponential is some fifteen
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SMALL[0],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
