"""decision_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, classifiers and classes."""

    batch: int
    modalities: int
    classes: int
    method: Literal["mean", "log"] = "mean"

    def __str__(self) -> str:
        return f"{self.method} of {self.modalities}x{self.batch}x{self.classes}"

    def inputs(self) -> dict[str, Any]:
        logits = [torch.randn(self.batch, self.classes) for _ in range(self.modalities)]
        weights = torch.rand(self.modalities)
        return {"logits": logits, "weights": weights / weights.sum()}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.decision_fusion(**arguments, method=self.method)

    def plain(self, logits: tuple[Tensor, ...], weights: Tensor) -> Tensor:
        decide = torch.softmax if self.method == "mean" else torch.log_softmax
        fused = sum((w * decide(z, -1) for w, z in zip(weights, logits, strict=True)), torch.zeros(()))
        return fused if self.method == "mean" else fused.softmax(-1)

    def flops(self) -> float:
        return 20.0 * self.modalities * self.outputs()  # an exponential is some fifteen

    def outputs(self) -> int:
        return self.batch * self.classes


SHAPES = (
    Shape("text, audio and video over ImageNet's classes", 4096, 3, 1000),
    Shape("text, audio and video over ImageNet's classes", 4096, 3, 1000, "log"),
    Shape("two models over a vocabulary", 256, 2, 32000, "log"),
)
SMALL = (Shape("emotions of an utterance", 1, 3, 7, quick=True), Shape("emotions of a batch", 64, 3, 7, "log"))

SUITE = Suite(
    "softmax or log_softmax, weighted sum",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
