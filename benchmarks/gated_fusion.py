"""gated_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, widths of the modalities, output features; the sigmoid form or the softmax over modalities."""

    rows: int
    widths: tuple[int, ...]
    features: int
    sigmoid: bool = False

    def __str__(self) -> str:
        form = "sigmoid" if self.sigmoid else "softmax"
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features} {form}"

    @property
    def gates(self) -> int:
        return self.features * (1 if self.sigmoid else len(self.widths))

    def inputs(self) -> dict[str, Any]:
        return {
            "xs": [torch.randn(self.rows, width) for width in self.widths],
            "value_weights": [linear_weight(self.features, width) for width in self.widths],
            "value_biases": [torch.randn(self.features) for _ in self.widths],
            "gate_weight": linear_weight(self.gates, sum(self.widths)),
            "gate_bias": torch.randn(self.gates),
        }

    ours = staticmethod(mmk.gated_fusion)

    def plain(self, xs: Any, value_weights: Any, value_biases: Any, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
        layers = zip(xs, value_weights, value_biases, strict=True)
        values = [torch.tanh(F.linear(x, weight, bias)) for x, weight, bias in layers]
        gates = F.linear(torch.cat(xs, -1), gate_weight, gate_bias)
        if self.sigmoid:
            z = torch.sigmoid(gates)
            return z * values[0] + (1 - z) * values[1]
        shares = gates.unflatten(-1, (len(xs), -1)).softmax(-2)
        return (shares * torch.stack(values, -2)).sum(-2)

    def flops(self) -> float:
        """The products alone: every modality by its own weight, all of them by the gates'."""
        return 2.0 * self.rows * sum(self.widths) * (self.features + self.gates)

    def outputs(self) -> int:
        return self.rows * self.features


SHAPES = (
    Shape("MM-IMDb: plot and poster", 64, (300, 4096), 512, sigmoid=True),
    Shape("pooled image and text encoders", 256, (768, 512), 512, sigmoid=True),
    Shape("tokens of two encoders", 1024, (512, 512), 256, sigmoid=True),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 256),
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128, quick=True),
)
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128),
    Shape("one utterance, two modalities", 1, (128, 32), 64, sigmoid=True),
    Shape("a batch of utterances, narrow", 16, (20, 20), 32, sigmoid=True),
)

SUITE = Suite(
    "torch cat, linears, gates",
    forward={"forward": SHAPES, "small forward": SMALL},
    training={"training": SHAPES, "small training": SMALL},
)
