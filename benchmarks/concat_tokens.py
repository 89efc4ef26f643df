"""concat_tokens: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import norm


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    lengths: tuple[int, ...]
    features: int
    norm: Literal["layer", "rms"] | None = "layer"

    backward_flops = 1.6

    def __str__(self) -> str:
        size = f"{self.batch}x({'+'.join(map(str, self.lengths))})x{self.features}"
        return f"{size} types and positions, {self.norm or 'no'} norm"

    def inputs(self) -> dict[str, Any]:
        c = self.features
        given: dict[str, Any] = {"xs": [torch.randn(self.batch, n, c) for n in self.lengths]}
        given["type_embedding"] = torch.randn(len(self.lengths), c)
        given["position_embeddings"] = [torch.randn(n, c) for n in self.lengths]
        affine = {"layer": ("norm_weight", "norm_bias"), "rms": ("norm_weight",), None: ()}[self.norm]
        return given | {name: torch.randn(c) for name in affine}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.concat_tokens(**arguments, norm=self.norm)

    def plain(
        self,
        xs: tuple[Tensor, ...],
        type_embedding: Tensor,
        position_embeddings: tuple[Tensor, ...],
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
    ) -> Tensor:
        added = [x + kind + at for x, kind, at in zip(xs, type_embedding, position_embeddings, strict=True)]
        return norm(torch.cat(added, 1), self.norm, norm_weight, norm_bias)

    def flops(self) -> float:
        return 10.0 * self.outputs()

    def outputs(self) -> int:
        return self.batch * sum(self.lengths) * self.features


SHAPES = (
    Shape("ViLT: text, image patches", 8, (40, 200), 768),
    Shape("text, image, audio", 8, (40, 200, 25), 768, quick=True),
    Shape("long context, one sequence", 1, (2048, 1024), 1024, norm="rms"),
    Shape("video and text, no norm", 4, (784, 64), 1024, norm=None),
    Shape("small: sentiment from three summaries", 32, (1, 1, 1), 128),
)
# What keeps a GPU busy.
LARGE = (Shape("video, text and audio of a large model", 16, (4096, 256, 512), 1024, gpu=True),)

ROWS = (*SHAPES, *LARGE)
SUITE = Suite("torch add, cat, norm", forward={"forward": ROWS}, training={"training": ROWS})
