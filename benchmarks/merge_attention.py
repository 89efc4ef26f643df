"""merge_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    heads: int
    queries: int
    dim: int
    parts: int = 2

    any_dtype = ("lses",)  # float32

    def __str__(self) -> str:
        return f"{self.parts} of {self.batch}x{self.heads}x{self.queries} d{self.dim}"

    def inputs(self) -> dict[str, list[Tensor]]:
        size = (self.batch, self.heads, self.queries)
        sizes = {"outputs": (*size, self.dim), "lses": size}
        return {name: [torch.randn(shape) for _ in range(self.parts)] for name, shape in sizes.items()}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.merge_attention(**arguments)[0]

    def plain(self, outputs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> Tensor:
        stacked = torch.stack(lses)
        weights = torch.exp(stacked - stacked.logsumexp(0)).unsqueeze(-1)
        total = weights[0] * outputs[0]
        for weight, part in zip(weights[1:], outputs[1:], strict=True):
            total = total + weight * part
        return total.to(outputs[0].dtype)

    def flops(self) -> float:
        return 2.0 * self.outputs() * self.parts

    def outputs(self) -> int:
        return self.batch * self.heads * self.queries * self.dim


SHAPES = (
    Shape("text over image and audio", 2, 8, 77, 64, quick=True),
    Shape("latents over four sources", 1, 8, 1024, 64, 4),
    Shape("ViT-B/16 patches over two captions", 8, 12, 196, 64),
    Shape("decoding over two caches", 8, 8, 1, 128),
)

SUITE = Suite(
    "torch logsumexp, weighted sum",
    forward={"forward": SHAPES},
    training={"training": SHAPES},
)
