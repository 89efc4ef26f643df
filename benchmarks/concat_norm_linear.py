"""concat_norm_linear: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch cat, norm, linear, GELU"
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Rows, widths of the modalities, output features and the norm."""

    note: str
    rows: int
    widths: tuple[int, ...]
    features: int
    norm: str = "layer"

    def __str__(self) -> str:
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features} {self.norm}"

    @property
    def width(self) -> int:
        return sum(self.widths)


SHAPES = (
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 768),
    Shape("tokens to a narrow head", 4096, (512, 512, 512), 64),
    Shape("tokens to an encoder's width", 4096, (512, 512, 512), 768),
    Shape("many narrow rows", 8192, (64, 32, 32), 32),
    Shape("image and text tokens, RMS norm", 256, (1152, 896), 896, "rms"),
)
# What keeps a GPU busy.
LARGE = (
    Shape("tokens of a large model", 16384, (1024, 1024, 768), 1024),
    Shape("video tokens to a narrow head", 65536, (512, 512, 512), 64),
)
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128),
    Shape("a batch of utterances, narrow", 16, (20, 20, 20), 32),
    Shape("a batch of utterances, encoded", 64, (128, 32, 32), 64),
)


def plain(*leaves: Tensor, norm: str) -> Tensor:
    *xs, g, h, weight, bias = leaves
    features = torch.cat(xs, -1)
    if norm == "layer":
        normalised = F.layer_norm(features, g.shape, g, h, EPS)
    else:
        normalised = F.rms_norm(features, g.shape, g, EPS) + h
    return F.gelu(F.linear(normalised, weight, bias))


def ours(*leaves: Tensor, norm: str) -> Tensor:
    *xs, g, h, weight, bias = leaves
    return mmk.concat_norm_linear(xs, g, h, weight, bias, norm=norm, eps=EPS, activation="gelu")


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    width, features = shape.width, shape.features
    tensors = [torch.randn(shape.rows, k) for k in shape.widths]
    tensors += [torch.randn(width), torch.randn(width)]
    tensors += [torch.randn(features, width) * width**-0.5, torch.randn(features)]
    baseline = partial(plain, norm=shape.norm)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=(*(f"xs[{i}]" for i in range(len(shape.widths))), "norm_weight", "norm_bias", "weight", "bias"),
        ours=partial(ours, norm=shape.norm),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    """The products alone."""
    return (6.0 if training else 2.0) * shape.rows * shape.width * shape.features


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: inputs, parameters, output. Training also: the preactivation written and read, the output's gradient
    read, inputs and parameters read again, their gradients written."""
    inputs = shape.rows * shape.width + shape.features * (shape.width + 1) + 2 * shape.width
    output = shape.rows * shape.features
    return itemsize * float(3 * inputs + 4 * output if training else inputs + output)


def case(group: str, shape: Shape, *, training: bool = False, quick: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=quick,
    )


def cases() -> list[Case]:
    rows = [case("forward", s, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("training", s, training=True, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL]
    rows += [case("small training", s, training=True) for s in SMALL]
    rows += [case(f"large {'training' if t else 'forward'}", s, training=t) for s in LARGE for t in (False, True)]
    return rows
