"""norm_rotary: what is measured, and against what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


def _sums(query: Tensor, key: Tensor) -> Tensor:
    """One tensor of both, for either side alike."""
    return torch.cat([query.sum(2), key.sum(2)], 1)


@dataclass(frozen=True)
class Shape(Workload):
    """Heads of queries and of keys as views of projections, (B, L, H, D) in memory, with a table of all positions."""

    batch: int
    heads: int
    key_heads: int
    length: int
    features: int
    norm: bool = True
    interleaved: bool = False

    backward_flops = 2.0

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.key_heads else f"{self.heads}+{self.key_heads}"
        kind = "interleaved" if self.interleaved else "halves"
        return f"{self.batch}x{heads}x{self.length}x{self.features} {kind}{', norms' if self.norm else ''}"

    def inputs(self) -> dict[str, Tensor]:
        def heads(count: int) -> Tensor:
            return torch.randn(self.batch, self.length, count, self.features).transpose(1, 2)

        found = {"query": heads(self.heads), "key": heads(self.key_heads)}
        weights = {name: torch.rand(self.features) + 0.5 for name in ("query_weight", "key_weight")}
        return {**found, **(weights if self.norm else {})}

    def options(self) -> dict[str, Any]:
        frequency = 10000.0 ** (-torch.arange(0, self.features, 2) / self.features)
        angle = torch.arange(self.length)[:, None] * frequency
        return {"cos": angle.cos(), "sin": angle.sin()}

    def torch_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Tables of all features."""
        if self.interleaved:
            return {name: table.repeat_interleave(2, -1) for name, table in options.items()}
        return {name: torch.cat([table, table], -1) for name, table in options.items()}

    def ours(self, **arguments: Any) -> Tensor:
        return _sums(*mmk.norm_rotary(**arguments, interleaved=self.interleaved))

    def plain(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_weight: Tensor | None = None,
        key_weight: Tensor | None = None,
    ) -> Tensor:
        """The norm in torch's one op, then the rotation as transformers and diffusers write it."""

        def turned(x: Tensor) -> Tensor:
            if self.interleaved:
                first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
                return torch.stack([-second, first], -1).flatten(-2)
            first, second = x.chunk(2, -1)
            return torch.cat([-second, first], -1)

        def of(x: Tensor, weight: Tensor | None) -> Tensor:
            x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight, 1e-6)
            return x * cos + turned(x) * sin

        return _sums(of(query, query_weight), of(key, key_weight))

    def flops(self) -> float:
        return (10.0 if self.norm else 3.0) * self.outputs()

    def outputs(self) -> int:
        return self.batch * (self.heads + self.key_heads) * self.length * self.features


SHAPES = (
    Shape("FLUX, 1024x1024 images", 1, 24, 24, 4608, 128, interleaved=True),
    Shape("Qwen3, a prompt", 1, 32, 8, 1024, 128, quick=True),
    Shape("LLaMA, a prompt", 1, 32, 8, 1024, 64, norm=False),
    Shape("a vision tower's image", 1, 16, 16, 1024, 80, norm=False),
    Shape("a token of each of two", 2, 8, 8, 1, 128, norm=False),
)
LARGE = (Shape("FLUX, four images", 4, 24, 24, 4608, 128, interleaved=True, gpu=True),)

ROWS = (*SHAPES, *LARGE)
SUITE = Suite("torch norm, rotation by cat or stack", forward={"forward": ROWS}, training={"training": ROWS})
