"""merge_embeddings: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    batch: int
    length: int
    features: int
    inserted: int  # consecutive places in each batch element

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.features}, {self.inserted} inserted"

    def inputs(self) -> dict[str, Tensor]:
        text = torch.randn(self.batch, self.length, self.features)
        return {"text": text, "modal": torch.randn(self.batch * self.inserted, self.features)}

    def options(self) -> dict[str, Tensor]:
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        start = (self.length - self.inserted) // 2
        mask[:, start : start + self.inserted] = True
        return {"mask": mask}

    ours = staticmethod(mmk.merge_embeddings)

    def plain(self, text: Tensor, modal: Tensor, mask: Tensor) -> Tensor:
        return text.masked_scatter(mask.unsqueeze(-1), modal)

    def flops(self) -> float:
        return 0.0

    def outputs(self) -> int:
        return self.batch * self.length * self.features

    def bytes(self, training: bool, itemsize: int) -> float:
        """Every row is read and written once a pass; backward also zeroes the rows of text that were replaced."""
        zeroed = self.batch * self.inserted * self.features
        return itemsize * float(4 * self.outputs() + zeroed if training else 2 * self.outputs())


SHAPES = (
    Shape("LLaVA, 24x24 patches", 4, 1024, 2048, 576),
    Shape("a small VLM, 8x8 patches", 8, 128, 960, 64, quick=True),
    Shape("prompt of one image", 1, 640, 4096, 576),
)
# What keeps a GPU busy.
LARGE = (Shape("LLaVA-Next 7B, tiles of an image", 8, 4096, 4096, 2880, gpu=True),)

SUITE = Suite(
    "masked_scatter",
    forward={"forward": (*SHAPES, *LARGE)},
    training={"training": (*SHAPES[1:], *LARGE)},
)
