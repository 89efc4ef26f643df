"""additive_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight, pooled


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, modalities, their width and the hidden features; M tensors, or one that is stacked already."""

    batch: int
    modalities: int
    width: int
    hidden: int
    stacked: bool = False
    query: bool = False  # with a query as wide as the modalities, a bias, and a fifth of the modalities absent

    def __str__(self) -> str:
        options = " query presence" if self.query else ""
        return f"{self.batch}x{self.modalities}x{self.width} a{self.hidden}{' stacked' * self.stacked}{options}"

    def inputs(self) -> dict[str, Any]:
        xs = [torch.randn(self.batch, self.width) for _ in range(self.modalities)]
        given: dict[str, Any] = {"xs": torch.stack(xs, 1) if self.stacked else xs}
        given |= {"weight": linear_weight(self.hidden, self.width), "vector": torch.randn(self.hidden)}
        if self.query:
            given |= {"bias": torch.randn(self.hidden), "query": torch.randn(self.batch, self.width)}
            given["query_weight"] = linear_weight(self.hidden, self.width)
        return given

    def options(self) -> dict[str, Any]:
        if not self.query:
            return {}
        presence = torch.rand(self.batch, self.modalities) > 0.2
        presence[:, 0] = True
        return {"presence": presence}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.additive_attention_pool(**arguments)[0]

    def plain(
        self,
        xs: Any,
        weight: Tensor,
        vector: Tensor,
        bias: Tensor | None = None,
        query: Tensor | None = None,
        query_weight: Tensor | None = None,
        presence: Tensor | None = None,
    ) -> Tensor:
        x = xs if self.stacked else torch.stack(xs, 1)
        hidden = F.linear(x, weight, bias)
        if query is not None:
            hidden = hidden + F.linear(query, query_weight).unsqueeze(1)
        energies = torch.tanh(hidden) @ vector
        return pooled(x, energies if presence is None else energies.masked_fill(~presence, -torch.inf))

    def flops(self) -> float:
        """The products with the weights."""
        return 2.0 * self.batch * (self.modalities + self.query) * self.width * self.hidden

    def outputs(self) -> int:
        return self.batch * self.width


SHAPES = (
    Shape("text, audio, video encoders", 4096, 3, 512, 128, stacked=True),
    Shape("two pooled encoders", 512, 2, 300, 64, quick=True),
    Shape("many views", 256, 16, 1024, 128, stacked=True),
    Shape("a decoder's step over its modalities", 512, 4, 512, 128, query=True),
)
SMALL = (
    Shape("one utterance", 1, 3, 300, 64),
    Shape("a batch of utterances, narrow", 64, 4, 20, 32),
    Shape("one utterance, sixteen views", 1, 16, 1024, 128, stacked=True),
)

SUITE = Suite(
    "stack, linear, tanh, softmax, sum",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
