"""split_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, modalities, their width and the hidden features."""

    batch: int
    modalities: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.modalities}x{self.width} a{self.hidden}"

    def inputs(self) -> dict[str, Any]:
        energies = self.modalities * self.width
        return {
            "xs": [torch.randn(self.batch, self.width) for _ in range(self.modalities)],
            "weight1": linear_weight(self.hidden, self.width),
            "bias1": torch.randn(self.hidden),
            "weight2": linear_weight(energies, self.hidden),
            "bias2": torch.randn(energies),
        }

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.split_attention_pool(**arguments)[0]

    def plain(self, xs: tuple[Tensor, ...], weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        x = torch.stack(xs, 1)
        z = F.relu(F.linear(x.sum(1), weight1, bias1))
        return (F.linear(z, weight2, bias2).view(x.shape).softmax(1) * x).sum(1)

    def flops(self) -> float:
        """The products with both weights."""
        return 2.0 * self.batch * (1 + self.modalities) * self.width * self.hidden

    def outputs(self) -> int:
        """The result, and the share of every feature of every modality."""
        return self.batch * (1 + self.modalities) * self.width


SHAPES = (
    Shape("two branches", 4096, 2, 256, 64),
    Shape("text, audio, video encoders", 1024, 3, 512, 128),
    Shape("many views", 256, 16, 1024, 128),
)
SMALL = (
    Shape("one utterance", 1, 3, 300, 64, quick=True),
    Shape("a batch of utterances, narrow", 64, 4, 20, 32),
)

SUITE = Suite(
    "stack, sum, linears, softmax, sum",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
