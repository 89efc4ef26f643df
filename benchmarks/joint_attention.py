"""joint_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import attention, sum_over_tokens


@dataclass(frozen=True)
class Shape(Workload):
    """Lengths of the query streams, and of the key streams where those are others."""

    batch: int
    heads: int
    queries: tuple[int, ...]
    dim: int
    sources: tuple[int, ...] = ()

    backward_flops = 2.5  # five products, of which one forms the scores again
    kept = 1  # the outputs, for the backward

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.queries))
        if self.sources:
            lengths += f" over {'+'.join(map(str, self.sources))}"
        return f"{self.batch}x{self.heads} {lengths} d{self.dim}"

    def inputs(self) -> dict[str, list[Tensor]]:
        lengths = {
            "queries": self.queries,
            "keys": self.sources or self.queries,
            "values": self.sources or self.queries,
        }
        return {
            name: [torch.randn(self.batch, self.heads, n, self.dim) for n in streams]
            for name, streams in lengths.items()
        }

    def ours(self, **arguments: Any) -> Tensor:
        return sum_over_tokens(mmk.joint_attention(**arguments))

    def plain(self, **streams: tuple[Tensor, ...]) -> Tensor:
        joined = attention(*(torch.cat(xs, 2) for xs in streams.values()))
        return sum_over_tokens(joined.split(self.queries, 2))

    def baseline(self, **streams: tuple[Tensor, ...]) -> Tensor:
        """The streams concatenated, attended to, and split again into tensors of their own."""
        joined = F.scaled_dot_product_attention(*(torch.cat(xs, 2) for xs in streams.values()))
        return sum_over_tokens([out.contiguous() for out in joined.split(self.queries, 2)])

    def flops(self) -> float:
        """Two products."""
        return 4.0 * self.outputs() * sum(self.sources or self.queries)

    def outputs(self) -> int:
        return self.batch * self.heads * sum(self.queries) * self.dim


# Text beside image latents, as diffusion transformers have them, and one stream that reads several others.
SHAPES = (
    Shape("77+77 prompt tokens, 512² image", 1, 8, (154, 1024), 64),
    Shape("captions, text, ViT-B 24x24 patches", 2, 12, (32, 77, 576), 64),
    Shape("128 prompt tokens, wide heads", 1, 24, (128, 512), 128),
    Shape("text over text, image, audio", 4, 8, (64,), 64, (64, 196, 120)),
    Shape("a small batch", 8, 4, (16, 49), 32, quick=True),
)
# What keeps a GPU busy.
LARGE = (
    Shape("FLUX: 512 prompt tokens, 1024² image", 2, 24, (512, 4096), 128, gpu=True),
    Shape("video latents over text, image, audio", 2, 16, (8192,), 64, (77, 576, 512), gpu=True),
)

ROWS = (*SHAPES, *LARGE)
SUITE = Suite("torch cat, SDPA, split", forward={"forward": ROWS}, training={"training": ROWS})
