"""deformable_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    """Batch, queries, heights and widths of the levels, heads, features of a head, points of a level."""

    batch: int
    queries: int
    levels: tuple[tuple[int, int], ...]
    heads: int = 8
    width: int = 32
    points: int = 4

    def __str__(self) -> str:
        return f"{self.batch}x{self.queries}x{self.heads}x{self.width} of {len(self.levels)}x{self.points}"

    def inputs(self) -> dict[str, Tensor]:
        pixels, size = sum(h * w for h, w in self.levels), (self.batch, self.queries, self.heads, len(self.levels))
        return {
            "value": torch.randn(self.batch, pixels, self.heads, self.width),
            "sampling_locations": torch.rand(*size, self.points, 2) * 1.3 - 0.15,  # some beyond the edge
            "attention_weights": torch.rand(*size, self.points).flatten(3).softmax(-1).view(*size, self.points),
        }

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.deformable_attention(**arguments, spatial_shapes=self.levels)

    def plain(self, value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        """As the models of transformers have it, but in float32 at least: on the CPU torch's grid_sample of bfloat16
        reads what is no pixel."""
        wide = torch.promote_types(value.dtype, torch.float32)
        maps = value.to(wide).split([h * w for h, w in self.levels], 1)
        grids = (2 * sampling_locations.to(wide) - 1).transpose(1, 2).flatten(0, 1)  # [B H, Lq, levels, points, 2]
        sampled = []
        for level, (height, width) in enumerate(self.levels):
            image = maps[level].flatten(2).transpose(1, 2).reshape(-1, self.width, height, width)
            sampled.append(F.grid_sample(image, grids[:, :, level], align_corners=False))
        shares = attention_weights.transpose(1, 2).reshape(self.batch * self.heads, 1, self.queries, -1)
        out = (torch.stack(sampled, -2).flatten(-2) * shares).sum(-1)
        return out.to(value.dtype).view(self.batch, -1, self.queries).transpose(1, 2)

    def flops(self) -> float:
        """Four corners of every sample: a product and a sum, and in the backward twice as many."""
        return 8.0 * self.outputs() * len(self.levels) * self.points

    def outputs(self) -> int:
        return self.batch * self.queries * self.heads * self.width


SHAPES = (
    Shape("Grounding DINO encoder, 512 px", 1, 5440, ((64, 64), (32, 32), (16, 16), (8, 8))),
    Shape("its decoder, 900 queries", 2, 900, ((100, 134), (50, 67), (25, 34), (13, 17))),
    Shape("2500 queries in bird's eye view", 1, 2500, ((58, 100), (29, 50), (15, 25), (8, 13)), points=8),
    Shape("RT-DETR decoder, 300 queries", 2, 300, ((80, 80), (40, 40), (20, 20)), quick=True),
)
SMALL = (
    Shape("few queries, small maps", 1, 10, ((8, 8), (4, 4)), heads=4),
    Shape("odd sizes", 2, 33, ((17, 5), (1, 9)), heads=3, width=20, points=3),
)

SUITE = Suite(
    "torch grid_sample, level by level",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
