"""contrastive_loss: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    """Pairs and features."""

    pairs: int
    features: int

    def __str__(self) -> str:
        return f"{self.pairs}x{self.features}"

    def inputs(self) -> dict[str, Tensor]:
        x, y = (F.normalize(torch.randn(self.pairs, self.features), dim=-1) for _ in range(2))
        return {"x": x, "y": y, "logit_scale": torch.tensor(14.0)}

    ours = staticmethod(mmk.contrastive_loss)

    def plain(self, x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        labels = torch.arange(len(x))
        return (F.cross_entropy(logit_scale * x @ y.T, labels) + F.cross_entropy(logit_scale * y @ x.T, labels)) / 2

    def flops(self) -> float:
        """One product of all pairs."""
        return 2.0 * self.pairs**2 * self.features

    def outputs(self) -> int:
        return 1


SHAPES = (Shape("a batch of CLIP", 2048, 512), Shape("many small embeddings", 4096, 256))
SMALL = (Shape("a batch of a GPU", 64, 128, quick=True),)

SUITE = Suite(
    "both products, cross_entropy of each",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
