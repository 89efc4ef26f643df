"""sigmoid_contrastive_loss: what is measured, and against what."""

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
        return {"x": x, "y": y, "logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}

    ours = staticmethod(mmk.sigmoid_contrastive_loss)

    def plain(self, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
        return -F.logsigmoid((logit_scale * x @ y.T + logit_bias) * signs).sum() / len(x)

    def flops(self) -> float:
        """One product of all pairs."""
        return 2.0 * self.pairs**2 * self.features

    def outputs(self) -> int:
        return 1


SHAPES = (Shape("a batch of SigLIP", 2048, 512), Shape("many small embeddings", 4096, 256))
SMALL = (Shape("a batch of a GPU", 64, 128, quick=True),)

SUITE = Suite(
    "product, logsigmoid",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
