"""concat_linear: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, widths of the modalities and output features."""

    rows: int
    widths: tuple[int, ...]
    features: int
    option: Literal["", "absent", "absent per row", "gated residual"] = ""

    kept = 2  # the preactivation is written and read

    def __str__(self) -> str:
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features} {self.option}".rstrip()

    def inputs(self) -> dict[str, Any]:
        xs = [torch.randn(self.rows, width) for width in self.widths]
        weight, bias = linear_weight(self.features, sum(self.widths)), torch.randn(self.features)
        return {"xs": xs, "weight": weight, "bias": bias}

    def options(self) -> dict[str, Tensor]:
        count = len(self.widths)
        if self.option == "gated residual":
            return {"residual": torch.randn(self.rows, self.features), "gate": torch.tensor(0.5)}
        if self.option:
            every = self.option == "absent per row"
            return {"presence": torch.rand(self.rows, count) > 0.3 if every else torch.arange(count) != 1}
        return {}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.concat_linear(**arguments, activation="gelu")

    def plain(
        self,
        xs: tuple[Tensor, ...],
        weight: Tensor,
        bias: Tensor,
        presence: Tensor | None = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        if presence is not None:
            xs = tuple(x.masked_fill(~presence[..., i : i + 1], 0) for i, x in enumerate(xs))
        y = F.gelu(F.linear(torch.cat(xs, -1), weight, bias))
        if gate is not None:
            y = torch.tanh(gate) * y
        return y if residual is None else residual + y

    def flops(self) -> float:
        return 2.0 * self.rows * sum(self.widths) * self.features

    def outputs(self) -> int:
        return self.rows * self.features


SHAPES = (
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128, quick=True),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 768),
    Shape("tokens to a narrow head", 4096, (512, 512, 512), 64),
    Shape("tokens to an encoder's width", 4096, (512, 512, 512), 768),
    Shape("many narrow rows", 32768, (64, 32, 32), 32),
)
# What keeps a GPU busy.
LARGE = (
    Shape("tokens of a large model", 16384, (1024, 1024, 768), 1024, gpu=True),
    Shape("video tokens to a narrow head", 65536, (512, 512, 512), 64, gpu=True),
)
# Where the work is less than the cost of a call in plain torch.
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128, quick=True),
    Shape("one utterance, encoded", 1, (128, 32, 32), 64),
    Shape("one utterance, BERT", 1, (768, 74, 47), 128),
    Shape("a batch of utterances, narrow", 16, (20, 20, 20), 32),
    Shape("a batch of utterances", 16, (300, 74, 35), 128),
    Shape("a batch of utterances, encoded", 64, (128, 32, 32), 64),
)

OPTIONS = [replace(SHAPES[2], option=option) for option in ("absent", "absent per row", "gated residual")]
SUITE = Suite(
    "torch cat, linear, GELU",
    forward={"forward": SHAPES, "small forward": SMALL, "options": OPTIONS, "large forward": LARGE},
    training={"training": SHAPES, "small training": SMALL, "large training": LARGE},
)
