"""bidirectional_cross_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import sum_over_tokens


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    heads: int
    x: int
    y: int
    dim: int

    kept = 1  # the outputs, for the backward

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads} {self.x}x{self.y} d{self.dim}"

    def inputs(self) -> dict[str, Tensor]:
        lengths = {"x_query": self.x, "y_key": self.y, "x_value": self.x, "y_value": self.y}
        return {name: torch.randn(self.batch, self.heads, n, self.dim) for name, n in lengths.items()}

    def ours(self, **arguments: Any) -> Tensor:
        return sum_over_tokens(mmk.bidirectional_cross_attention(**arguments))

    def plain(self, x_query: Tensor, y_key: Tensor, x_value: Tensor, y_value: Tensor) -> Tensor:
        """As the models' own code has it: one product, a softmax over its rows and one over its columns."""
        scores = x_query @ y_key.mT * self.dim**-0.5
        return sum_over_tokens((scores.softmax(-1) @ y_value, scores.mT.softmax(-1) @ x_value))

    def flops(self) -> float:
        """Three products; those of a training pass are plain code's, which forms the scores but once."""
        return 6.0 * self.batch * self.heads * self.x * self.y * self.dim

    def outputs(self) -> int:
        return self.batch * self.heads * (self.x + self.y) * self.dim


# Image tokens by text tokens, as grounding models have them.
SHAPES = (
    Shape("one level of features, a caption", 1, 4, 5000, 64, 256),
    Shape("900 queries, 128 words", 2, 8, 900, 128, 64),
    Shape("all levels of features, a long prompt", 1, 4, 20000, 256, 64),
    Shape("two equal sequences", 2, 8, 512, 512, 64),
    Shape("a small batch", 8, 4, 49, 16, 32, quick=True),
)
# What keeps a GPU busy.
LARGE = (
    Shape("all levels of features, a batch of long prompts", 8, 4, 20000, 256, 256, gpu=True),
    Shape("two long sequences", 4, 8, 4096, 4096, 64, gpu=True),
)

ROWS = (*SHAPES, *LARGE)
SUITE = Suite("two softmaxes over one score matrix", forward={"forward": ROWS}, training={"training": ROWS})
