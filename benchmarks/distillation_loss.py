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
    """Rows, classes, the kind of divergence; features of the hidden states where heads are given instead of logits."""

    note: str
    rows: int
    classes: int
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    features: int = 0

    def __str__(self) -> str:
        size = f"{self.kind} {self.rows}x{self.classes}"
        return f"{size} from {self.features}" if self.features else size

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
HEADS = (Shape("a vocabulary from hidden states", 1024, 16000, "forward_kl", 256),)


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


def plain_of_heads(student: Tensor, weight: Tensor, *, teacher: Tensor, head: Tensor, shape: Shape) -> Tensor:
    teacher_logits = F.linear(teacher.to(student.dtype), head.to(student.dtype))
    return plain(F.linear(student, weight), teacher=teacher_logits, shape=shape)


def ours_of_heads(student: Tensor, weight: Tensor, *, teacher: Tensor, head: Tensor, shape: Shape) -> Tensor:
    heads = [(weight, None), (head, None)]
    return mmk.distillation_loss(student, teacher, temperature=TEMPERATURE, kind=shape.kind, linear=heads)


def problem_of_heads(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    student, teacher = (torch.randn(shape.rows, shape.features).to(dtype) for _ in range(2))
    weight, head = ((torch.randn(shape.classes, shape.features) * 0.05).to(dtype) for _ in range(2))
    given = dict(teacher=teacher, head=head, shape=shape)
    return Problem(
        leaves=(student.requires_grad_(training), weight.requires_grad_(training)),
        names=("student", "weight"),
        ours=partial(ours_of_heads, **given),
        torch=partial(plain_of_heads, **given),
        eager=partial(plain_of_heads, **given),
    )


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    if shape.features:
        return problem_of_heads(shape, training, dtype)
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
    """Both logits read; backward: both read, the student's gradient written. Of heads the inputs, and the gradients."""
    if shape.features:
        return itemsize * float(shape.features * (shape.rows + shape.classes) * (3 if training else 2))
    return itemsize * float(shape.elements * (5 if training else 2))


def flops(shape: Shape, training: bool) -> float:
    """An exponential is some fifteen; of heads the products alone, two of the forward and two of the gradients."""
    return float(shape.elements) * (2 * shape.features * (4 if training else 2) or (110 if training else 70))


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
    rows += [case("training from hidden states", s, training=True) for s in HEADS]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
