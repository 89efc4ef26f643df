"""modulated_norm: what is measured, and against what."""

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
    length: int
    features: int
    norm: Literal["layer", "rms"] | None = "layer"
    per_token: bool = False

    backward_flops = 15 / 9

    def __str__(self) -> str:
        kind = f"{self.norm or 'FiLM'}{', per token' if self.per_token else ''}"
        return f"{self.batch}x{self.length}x{self.features} {kind}"

    def inputs(self) -> dict[str, Tensor]:
        tokens = (self.batch, self.length, self.features)
        condition = tokens if self.per_token else (self.batch, self.features)
        return {"x": torch.randn(tokens), "shift": torch.randn(condition), "scale": torch.randn(condition)}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.modulated_norm(**arguments, norm=self.norm)

    def plain(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if not self.per_token:
            shift, scale = shift[:, None], scale[:, None]
        return norm(x, self.norm, eps=1e-6) * (1 + scale) + shift

    def flops(self) -> float:
        return 9.0 * self.outputs()

    def outputs(self) -> int:
        return self.batch * self.length * self.features


SHAPES = (
    Shape("DiT-XL/2, 64x64 latents", 4, 1024, 1152),
    Shape("DiT-B, 32x32 latents", 8, 256, 768, quick=True),
    Shape("rms, as in Lumina", 1, 1024, 2304, norm="rms"),
    Shape("a timestep for every token", 2, 512, 1536, per_token=True),
    Shape("FiLM of patches by text", 8, 196, 768, norm=None),
)
# What keeps a GPU busy.
LARGE = (
    Shape("DiT-XL/2, 1024x1024 images", 8, 4096, 1152, gpu=True),
    Shape("FLUX", 4, 4608, 3072, gpu=True),
)

ROWS = (*SHAPES, *LARGE)
SUITE = Suite("torch norm, multiply, add", forward={"forward": ROWS}, training={"training": ROWS})
