"""concat_norm_linear: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight, norm


@dataclass(frozen=True)
class Shape(Workload):
    """Rows, widths of the modalities, output features and the norm."""

    rows: int
    widths: tuple[int, ...]
    features: int
    norm: Literal["layer", "rms"] = "layer"

    kept = 2  # the preactivation is written and read

    def __str__(self) -> str:
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features} {self.norm}"

    def inputs(self) -> dict[str, Any]:
        width = sum(self.widths)
        given: dict[str, Any] = {"xs": [torch.randn(self.rows, k) for k in self.widths]}
        given |= {"norm_weight": torch.randn(width), "norm_bias": torch.randn(width)}
        return given | {"weight": linear_weight(self.features, width), "bias": torch.randn(self.features)}

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.concat_norm_linear(**arguments, norm=self.norm, activation="gelu")

    def plain(
        self, xs: tuple[Tensor, ...], norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return F.gelu(F.linear(norm(torch.cat(xs, -1), self.norm, norm_weight, norm_bias), weight, bias))

    def flops(self) -> float:
        """The products alone."""
        return 2.0 * self.rows * sum(self.widths) * self.features

    def outputs(self) -> int:
        return self.rows * self.features


SHAPES = (
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128, quick=True),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 768),
    Shape("tokens to a narrow head", 4096, (512, 512, 512), 64),
    Shape("tokens to an encoder's width", 4096, (512, 512, 512), 768),
    Shape("many narrow rows", 8192, (64, 32, 32), 32),
    Shape("image and text tokens, RMS norm", 256, (1152, 896), 896, "rms"),
)
# What keeps a GPU busy.
LARGE = (
    Shape("tokens of a large model", 16384, (1024, 1024, 768), 1024, gpu=True),
    Shape("video tokens to a narrow head", 65536, (512, 512, 512), 64, gpu=True),
)
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128),
    Shape("a batch of utterances, narrow", 16, (20, 20, 20), 32),
    Shape("a batch of utterances, encoded", 64, (128, 32, 32), 64),
)

SUITE = Suite(
    "torch cat, norm, linear, GELU",
    forward={"forward": SHAPES, "small forward": SMALL, "large forward": LARGE},
    training={"training": SHAPES, "small training": SMALL, "large training": LARGE},
)
