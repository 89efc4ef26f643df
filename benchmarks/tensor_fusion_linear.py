"""tensor_fusion_linear: what is measured, and against what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight, with_one


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    widths: tuple[int, ...]
    features: int

    def __str__(self) -> str:
        return f"{self.batch}x{'*'.join(map(str, self.widths))} n{self.features}"

    @property
    def fused(self) -> int:
        """The width of the outer product."""
        return math.prod(width + 1 for width in self.widths)

    def inputs(self) -> dict[str, Any]:
        xs = [torch.randn(self.batch, width) for width in self.widths]
        return {"xs": xs, "weight": linear_weight(self.features, self.fused), "bias": torch.randn(self.features)}

    ours = staticmethod(mmk.tensor_fusion_linear)

    def plain(self, xs: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> Tensor:
        """As the paper's code has it: the outer product of the modalities with a 1 in front, then a linear layer."""
        fused = with_one(xs[0])
        for x in xs[1:]:
            fused = torch.einsum("bi,bj->bij", fused, with_one(x)).flatten(1)
        return F.linear(fused, weight, bias)

    def flops(self) -> float:
        """The product with the weight alone."""
        return 2.0 * self.outputs() * self.fused

    def outputs(self) -> int:
        return self.batch * self.features


SHAPES = (
    Shape("sentiment, one utterance", 1, (20, 5, 74), 64),
    Shape("sentiment, a small batch", 32, (20, 5, 74), 64, quick=True),
    Shape("three modalities, a small batch", 32, (32, 32, 32), 128),
    Shape("two modalities", 256, (64, 64), 128),
    Shape("three modalities", 256, (32, 32, 32), 128),
    Shape("two modalities, a large batch", 2048, (64, 64), 256),
)

SUITE = Suite(
    "outer product, linear",
    forward={"forward": SHAPES},
    training={"training": SHAPES},
)
