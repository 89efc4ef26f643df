"""multimodal_cross_entropy: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, classes, modalities."""

    rows: int
    classes: int
    modalities: int = 3

    backward_flops = 1.0

    def __str__(self) -> str:
        return f"{self.modalities} of {self.rows}x{self.classes}"

    def inputs(self) -> dict[str, Any]:
        return {"logits": [torch.randn(self.rows, self.classes) for _ in range(self.modalities)]}

    def options(self) -> dict[str, Tensor]:
        labels = torch.randint(0, self.classes, (self.rows,))
        return {"labels": labels, "weights": 1 / torch.arange(1, self.modalities + 1)}

    def torch_options(self, options: Any) -> dict[str, Any]:
        return {**options, "weights": options["weights"].tolist()}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.multimodal_cross_entropy(**arguments)[0]

    def plain(self, logits: tuple[Tensor, ...], labels: Tensor, weights: list[float]) -> Tensor:
        terms = zip(weights, logits, strict=True)
        return torch.stack([weight * F.cross_entropy(z, labels) for weight, z in terms]).sum()

    def flops(self) -> float:
        """An exponential counts as one."""
        return 3.0 * self.modalities * self.rows * self.classes

    def outputs(self) -> int:
        return 1


@dataclass(frozen=True)
class HeadShape(Shape):
    """Hidden states of as many features and a head's weight instead of logits."""

    modalities: int = 1
    features: int = 256

    backward_flops = 2.0

    def __str__(self) -> str:
        return f"{super().__str__()} from {self.features}"

    def inputs(self) -> dict[str, Any]:
        hidden, weight = torch.randn(self.rows, self.features), torch.randn(self.classes, self.features) * 0.05
        return {"hidden": hidden, "weight": weight}

    def options(self) -> dict[str, Tensor]:
        return {"labels": torch.randint(0, self.classes, (self.rows,))}

    def torch_options(self, options: Any) -> dict[str, Any]:
        return options

    def ours(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return mmk.multimodal_cross_entropy([hidden], labels, linear=[(weight, None)])[0]

    def plain(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels)

    def flops(self) -> float:
        """The product alone."""
        return 2.0 * self.features * self.rows * self.classes


SHAPES = (
    Shape("three heads of ImageNet's classes", 1024, 1000, quick=True),
    Shape("three heads of 8000 classes", 1024, 8000),
    Shape("emotions of utterances", 4096, 7),
    Shape("a vocabulary", 512, 32000, 1),
)
SMALL = (Shape("a small batch", 32, 10),)
HEADS = (HeadShape("a vocabulary from hidden states", 1024, 16000),)

SUITE = Suite(
    "weighted sum of F.cross_entropy",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "training from hidden states": HEADS, "small training": SMALL},
)
