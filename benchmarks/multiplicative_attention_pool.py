"""multiplicative_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight, pooled


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, modalities and their width; the width of the query where it has a weight."""

    batch: int
    modalities: int
    width: int
    query: int = 0

    def __str__(self) -> str:
        weight = f" query {self.query}" if self.query else ""
        return f"{self.batch}x{self.modalities}x{self.width}{weight}"

    def inputs(self) -> dict[str, Any]:
        xs = [torch.randn(self.batch, self.width) for _ in range(self.modalities)]
        query = torch.randn(self.batch, self.query or self.width)
        weight = {"weight": linear_weight(self.width, self.query).t().contiguous()} if self.query else {}
        return {"xs": xs, "query": query, **weight}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.multiplicative_attention_pool(**arguments)[0]

    def plain(self, xs: tuple[Tensor, ...], query: Tensor, weight: Tensor | None = None) -> Tensor:
        x = torch.stack(xs, 1)
        projected = query if weight is None else query @ weight
        return pooled(x, (x @ projected.unsqueeze(-1)).squeeze(-1) * self.width**-0.5)

    def flops(self) -> float:
        """The product with the weight, and those of every modality with the query and its weight."""
        return 2.0 * self.batch * self.width * (self.query + 2 * self.modalities)

    def outputs(self) -> int:
        return self.batch * self.width


SHAPES = (
    Shape("text, audio, video under a question", 4096, 3, 512, 512),
    Shape("two pooled encoders, dot products", 4096, 2, 300),
    Shape("many views under a question", 256, 16, 1024, 512),
)
SMALL = (
    Shape("one utterance under a question", 1, 3, 300, 300, quick=True),
    Shape("a batch of utterances, narrow", 64, 4, 20),
)

SUITE = Suite(
    "stack, matmul, softmax, sum",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
