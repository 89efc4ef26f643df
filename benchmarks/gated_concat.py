"""gated_concat: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, widths of both modalities; a gate per feature of the first, or one for all."""

    rows: int
    widths: tuple[int, int]
    one_gate: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x({self.widths[0]}+{self.widths[1]})" + " one gate" * self.one_gate

    @property
    def gates(self) -> int:
        return 1 if self.one_gate else self.widths[0]

    def inputs(self) -> dict[str, Tensor]:
        x, y = (torch.randn(self.rows, width) for width in self.widths)
        weight = linear_weight(self.gates, sum(self.widths))
        return {"x": x, "y": y, "weight": weight, "bias": torch.randn(self.gates)}

    ours = staticmethod(mmk.gated_concat)

    def plain(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        gated = torch.sigmoid(F.linear(torch.cat([x, y], -1), weight, bias)) * x
        return torch.cat([gated, y, gated.sum(-1, keepdim=True)], -1)

    def flops(self) -> float:
        """The product alone."""
        return 2.0 * self.rows * sum(self.widths) * self.gates

    def outputs(self) -> int:
        return self.rows * (sum(self.widths) + 1)


SHAPES = (
    Shape("utterances: GloVe and COVAREP", 64, (300, 74), quick=True),
    Shape("pooled text and image encoders", 256, (768, 512)),
    Shape("tokens of two encoders", 4096, (256, 256)),
    Shape("tokens of two encoders", 8192, (256, 256), one_gate=True),
)
SMALL = (
    Shape("one utterance", 1, (300, 74)),
    Shape("one utterance, one gate", 1, (128, 32), one_gate=True),
    Shape("a batch of utterances, narrow", 16, (20, 20)),
)

SUITE = Suite(
    "torch cat, linear, gate, cat",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
