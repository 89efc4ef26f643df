"""low_rank_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import with_one


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    widths: tuple[int, ...]
    features: int
    rank: int

    def __str__(self) -> str:
        return f"{self.batch}x{'+'.join(map(str, self.widths))} n{self.features} r{self.rank}"

    def inputs(self) -> dict[str, Any]:
        xs = [torch.randn(self.batch, width) for width in self.widths]
        factors = [torch.randn(self.rank, k + 1, self.features) / (k + 1) ** 0.5 for k in self.widths]
        return {
            "xs": xs,
            "factors": factors,
            "rank_weights": torch.randn(self.rank),
            "bias": torch.randn(self.features),
        }

    ours = staticmethod(mmk.low_rank_fusion)

    def plain(self, xs: tuple[Tensor, ...], factors: tuple[Tensor, ...], rank_weights: Tensor, bias: Tensor) -> Tensor:
        """As the paper's code has it: one batched product per modality, their product, a weighted sum of the ranks."""
        product, *more = (with_one(x) @ factor for x, factor in zip(xs, factors, strict=True))  # [R, B, N] each
        for projection in more:
            product = product * projection
        return torch.matmul(rank_weights.unsqueeze(0), product.permute(1, 0, 2)).squeeze(1) + bias

    def flops(self) -> float:
        """Those of a training pass are plain code's; ours forms the projections a second time beside them."""
        return 2.0 * self.outputs() * self.rank * sum(width + 1 for width in self.widths)

    def outputs(self) -> int:
        return self.batch * self.features


SHAPES = (
    Shape("sentiment, one utterance", 1, (32, 32, 32), 64, 4),
    Shape("sentiment, a small batch", 32, (32, 32, 32), 64, 4, quick=True),
    Shape("uneven modalities, a small batch", 32, (20, 5, 74), 128, 16),
    Shape("two modalities", 256, (64, 64), 128, 8),
    Shape("raw features of text, audio, video", 256, (300, 74, 35), 256, 16),
    Shape("uneven modalities, a large batch", 2048, (20, 5, 74), 128, 16),
)

SUITE = Suite(
    "products of matmuls",
    forward={"forward": SHAPES},
    training={"training": SHAPES},
)
