"""varlen_cross_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload


@dataclass(frozen=True)
class Shape(Workload):
    """Lengths of the members' queries and keys."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    dim: int
    kv_heads: int = 0  # as many as heads

    backward_flops = 2.5  # five products, of which one forms the scores again
    kept = 1  # the outputs, for the backward

    def __str__(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        return f"{len(self.queries)}x{heads} {_range(self.queries)}x{_range(self.keys)} d{self.dim}"

    def inputs(self) -> dict[str, Tensor]:
        key, value = (torch.randn(sum(self.keys), self.kv_heads or self.heads, self.dim) for _ in range(2))
        return {"query": torch.randn(sum(self.queries), self.heads, self.dim), "key": key, "value": value}

    def options(self) -> dict[str, Any]:
        starts = (torch.tensor([0, *accumulate(n)], dtype=torch.int32) for n in (self.queries, self.keys))
        longest = {"max_seqlen_q": max(self.queries), "max_seqlen_k": max(self.keys)}
        return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True)) | longest

    def torch_options(self, options: Any) -> dict[str, Any]:
        return {}  # it splits by the lengths

    ours = staticmethod(mmk.varlen_cross_attention)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As a loop over the members writes it."""
        parts = zip(query.split(self.queries), key.split(self.keys), value.split(self.keys), strict=True)
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), enable_gqa=bool(self.kv_heads))
            for part in parts
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def flops(self) -> float:
        """Two products."""
        return 4.0 * self.heads * sum(q * k for q, k in zip(self.queries, self.keys, strict=True)) * self.dim

    def outputs(self) -> int:
        return sum(self.queries) * self.heads * self.dim


def _range(lengths: tuple[int, ...]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low}-{high}"


SHAPES = (
    Shape("patches of images of any size, their captions", (196, 50, 640, 12), (32, 77, 5, 400), 8, 64),
    Shape("captions, images of any size", (12, 40, 77, 30, 9, 64), (196, 576, 1024, 256, 729, 400), 12, 64),
    Shape("many short texts, grouped heads", (5, 17, 9, 30) * 8, (16, 49, 25, 36) * 8, 8, 64, 2, quick=True),
    Shape("decoding over images of any size", (1,) * 6, (196, 576, 1024, 256, 729, 1600), 8, 128),
)

SUITE = Suite("torch SDPA by member", forward={"forward": SHAPES}, training={"training": SHAPES[:3]})
