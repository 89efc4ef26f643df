"""distillation_loss: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "log_softmax of both, divergence"
TEMPERATURE = 2.0


@dataclass(frozen=True)
class Shape:
    """Rows, classes and the kind of divergence."""

    note: str
    rows: int
    classes: int
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"

    def __str__(self) -> str:
        return f"{self.kind} {self.rows}x{self.classes}"

    @property
    def elements(self) -> int:
        return self.rows * self.classes


SHAPES = (
    Shape("tokens of a small vocabulary", 1024, 8000),
    Shape("tokens of a small vocabulary", 1024, 8000, "reverse_kl"),
    Shape("tokens of a small vocabulary", 1024, 8000, "jsd"),
    Shape("tokens of Llama's vocabulary", 128, 32000),
)
SMALL = (Shape("a batch of images", 64, 10), Shape("a batch of images", 64, 10, "jsd"))


def plain(student: Tensor, *, teacher: Tensor, shape: Shape) -> Tensor:
    teacher = teacher.to(student.dtype)  # the check asks in float64 too
    s, t = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(-1).mean()

    if shape.kind == "jsd":
        m = torch.log(0.5 * t.exp() + 0.5 * s.exp())
        loss = 0.5 * divergence(t, m) + 0.5 * divergence(s, m)
    else:
        loss = divergence(t, s) if shape.kind == "forward_kl" else divergence(s, t)
    return TEMPERATURE**2 * loss


def ours(student: Tensor, *, teacher: Tensor, shape: Shape) -> Tensor:
    return mmk.distillation_loss(student, teacher, temperature=TEMPERATURE, kind=shape.kind)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    student, teacher = (torch.randn(shape.rows, shape.classes).to(dtype) for _ in range(2))
    baseline = partial(plain, teacher=teacher, shape=shape)
    return Problem(
        leaves=(student.requires_grad_(training),),
        names=("student",),
        ours=partial(ours, teacher=teacher, shape=shape),
        torch=baseline,
        eager=baseline,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Both logits read; backward: both read, the student's gradient written."""
    return itemsize * float(shape.elements * (5 if training else 2))


def case(group: str, shape: Shape, *, training: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=float(shape.elements * (110 if training else 70)),  # an exponential is some fifteen
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SMALL[0],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
