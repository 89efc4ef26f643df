"""bilinear_fusion: what is measured, and against what."""

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
    batch: int
    x_width: int
    y_width: int
    features: int
    rank: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.x_width}*{self.y_width} n{self.features} r{self.rank}"

    def inputs(self) -> dict[str, Tensor]:
        widths, rows = (self.x_width, self.y_width), self.features * self.rank
        x, y = (torch.randn(self.batch, width) for width in widths)
        x_weight, y_weight = (linear_weight(rows, width) for width in widths)
        return {"x": x, "y": y, "x_weight": x_weight, "y_weight": y_weight}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.bilinear_fusion(**arguments, rank=self.rank)

    def plain(self, x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor) -> Tensor:
        z = F.linear(x, x_weight) * F.linear(y, y_weight)
        return z if self.rank == 1 else z.view(self.batch, -1, self.rank).sum(-1)

    def flops(self) -> float:
        return 2.0 * self.batch * self.features * self.rank * (self.x_width + self.y_width)

    def outputs(self) -> int:
        return self.batch * self.features


SHAPES = (
    Shape("one image, one question", 1, 1024, 768, 200, 5),
    Shape("sentiment, a small batch", 32, 300, 74, 64, 1, quick=True),
    Shape("image and question, a small batch", 32, 2048, 1024, 1000, 1),
    Shape("pooled windows", 256, 512, 512, 256, 5),
    Shape("image and question", 256, 2048, 1024, 1000, 1),
    Shape("image regions and question", 512, 1024, 768, 200, 5),
)

SUITE = Suite(
    "two linears, product",
    forward={"forward": SHAPES},
    training={"training": SHAPES},
)
