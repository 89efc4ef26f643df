"""concat_linear: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch cat, linear, GELU"


@dataclass(frozen=True)
class Shape:
    """Rows, widths of the modalities and output features."""

    note: str
    rows: int
    widths: tuple[int, ...]
    features: int

    def __str__(self) -> str:
        return f"{self.rows}x({'+'.join(map(str, self.widths))}) to {self.features}"

    @property
    def width(self) -> int:
        return sum(self.widths)


SHAPES = (
    Shape("sentiment: GloVe, COVAREP, Facet", 64, (300, 74, 35), 128),
    Shape("pooled image, text and audio encoders", 256, (768, 768, 512), 768),
    Shape("tokens to a narrow head", 4096, (512, 512, 512), 64),
    Shape("tokens to an encoder's width", 4096, (512, 512, 512), 768),
    Shape("many narrow rows", 32768, (64, 32, 32), 32),
)
# What keeps a GPU busy.
LARGE = (
    Shape("tokens of a large model", 16384, (1024, 1024, 768), 1024),
    Shape("video tokens to a narrow head", 65536, (512, 512, 512), 64),
)
# Where the work is less than the cost of a call in plain torch.
SMALL = (
    Shape("one utterance", 1, (300, 74, 35), 128),
    Shape("one utterance, encoded", 1, (128, 32, 32), 64),
    Shape("one utterance, BERT", 1, (768, 74, 47), 128),
    Shape("a batch of utterances, narrow", 16, (20, 20, 20), 32),
    Shape("a batch of utterances", 16, (300, 74, 35), 128),
    Shape("a batch of utterances, encoded", 64, (128, 32, 32), 64),
)


def plain(
    *leaves: Tensor,
    count: int,
    presence: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """As one writes it; in float64, where options are bound in, they follow."""
    xs, (weight, bias) = leaves[:count], leaves[count:]
    if presence is not None:
        xs = tuple(x.masked_fill(~presence[..., i : i + 1], 0) for i, x in enumerate(xs))
    y = F.gelu(F.linear(torch.cat(xs, -1), weight, bias))
    if gate is not None:
        y = torch.tanh(gate.to(y.dtype)) * y
    return y if residual is None else residual.to(y.dtype) + y


def ours(*leaves: Tensor, count: int, **options: Any) -> Tensor:
    return mmk.concat_linear(leaves[:count], *leaves[count:], activation="gelu", **options)


def problem(shape: Shape, training: bool, kind: str, dtype: torch.dtype) -> Problem:
    gain = shape.width**-0.5
    count = len(shape.widths)
    tensors = [torch.randn(shape.rows, k) for k in shape.widths]
    tensors += [torch.randn(shape.features, shape.width) * gain, torch.randn(shape.features)]
    options: dict[str, Any] = {}
    if kind == "absent":
        options["presence"] = torch.arange(count) != 1
    elif kind == "absent per row":
        options["presence"] = torch.rand(shape.rows, count) > 0.3
    elif kind == "gated residual":
        options["residual"] = torch.randn(shape.rows, shape.features).to(dtype)
        options["gate"] = torch.tensor(0.5).to(dtype)
    baseline = partial(plain, count=count, **options)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=(*(f"xs[{i}]" for i in range(count)), "weight", "bias"),
        ours=partial(ours, count=count, **options),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    return (6.0 if training else 2.0) * shape.rows * shape.width * shape.features


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: inputs, weight, output. Training also: the preactivation written and read, the output's gradient read,
    inputs and weight read again, their gradients written."""
    inputs = shape.rows * shape.width + shape.features * (shape.width + 1)
    output = shape.rows * shape.features
    return itemsize * float(3 * inputs + 4 * output if training else inputs + output)


def case(group: str, shape: Shape, *, training: bool = False, kind: str = "", quick: bool = False) -> Case:
    return Case(
        group=group,
        shape=f"{shape} {kind}".strip(),
        note=shape.note,
        problem=partial(problem, shape, training, kind),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=quick,
    )


def cases() -> list[Case]:
    rows = [case("forward", s, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("training", s, training=True, quick=s is SHAPES[0]) for s in SHAPES]
    rows += [case("small forward", s, quick=s is SMALL[0]) for s in SMALL]
    rows += [case("small training", s, training=True, quick=s is SMALL[0]) for s in SMALL]
    rows += [case("options", SHAPES[2], kind=k) for k in ("absent", "absent per row", "gated residual")]
    rows += [case(f"large {'training' if t else 'forward'}", s, training=t) for s in LARGE for t in (False, True)]
    return rows
