"""distillation_loss: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload

TEMPERATURE = 2.0


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, classes and the kind of divergence."""

    rows: int
    classes: int
    kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"

    backward_flops = 4 / 7

    def __str__(self) -> str:
        return f"{self.kind} {self.rows}x{self.classes}"

    def inputs(self) -> dict[str, Tensor]:
        return {"student": torch.randn(self.rows, self.classes)}

    def options(self) -> dict[str, Tensor]:
        return {"teacher": torch.randn(self.rows, self.classes)}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.distillation_loss(**arguments, temperature=TEMPERATURE, kind=self.kind)

    def plain(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)

        def divergence(p: Tensor, q: Tensor) -> Tensor:
            return (p.exp() * (p - q)).sum(-1).mean()

        if self.kind == "jsd":
            m = torch.log(0.5 * t.exp() + 0.5 * s.exp())
            loss = 0.5 * divergence(t, m) + 0.5 * divergence(s, m)
        else:
            loss = divergence(t, s) if self.kind == "forward_kl" else divergence(s, t)
        return TEMPERATURE**2 * loss

    def flops(self) -> float:
        return 70.0 * self.rows * self.classes  # an exponential is some fifteen

    def outputs(self) -> int:
        return 1


@dataclass(frozen=True)
class HeadShape(Shape):
    """Hidden states of as many features and two heads' weights instead of logits."""

    features: int = 256

    backward_flops = 1.0  # the student's two products

    def __str__(self) -> str:
        return f"{super().__str__()} from {self.features}"

    def inputs(self) -> dict[str, Tensor]:
        return {"student": torch.randn(self.rows, self.features), "weight": self._head()}

    def options(self) -> dict[str, Tensor]:
        return {"teacher": torch.randn(self.rows, self.features), "head": self._head()}

    def _head(self) -> Tensor:
        return torch.randn(self.classes, self.features) * 0.05

    def ours(self, student: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        return super().ours(student=student, teacher=teacher, linear=[(weight, None), (head, None)])

    def plain(self, student: Tensor, weight: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
        return super().plain(F.linear(student, weight), F.linear(teacher, head))

    def flops(self) -> float:
        """The products alone."""
        return 4.0 * self.features * self.rows * self.classes


SHAPES = (
    Shape("tokens of a small vocabulary", 1024, 8000),
    Shape("tokens of a small vocabulary", 1024, 8000, "reverse_kl"),
    Shape("tokens of a small vocabulary", 1024, 8000, "jsd"),
    Shape("tokens of Llama's vocabulary", 128, 32000),
)
SMALL = (Shape("a batch of images", 64, 10, quick=True), Shape("a batch of images", 64, 10, "jsd"))
HEADS = (HeadShape("a vocabulary from hidden states", 1024, 16000),)

SUITE = Suite(
    "log_softmax of both, divergence",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "training from hidden states": HEADS, "small training": SMALL},
)
