"""additive_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "stack, linear, tanh, softmax, sum"


@dataclass(frozen=True)
class Shape:
    """Rows, modalities, their width and the hidden features; M tensors, or one that is stacked already."""

    note: str
    batch: int
    modalities: int
    width: int
    hidden: int
    stacked: bool = False
    query: bool = False  # with a query as wide as the modalities, a bias, and a fifth of the modalities absent

    def __str__(self) -> str:
        options = " query presence" if self.query else ""
        return f"{self.batch}x{self.modalities}x{self.width} a{self.hidden}{' stacked' * self.stacked}{options}"

    @property
    def elements(self) -> int:
        return self.batch * self.modalities * self.width


SHAPES = (
    Shape("text, audio, video encoders", 4096, 3, 512, 128, stacked=True),
    Shape("two pooled encoders", 512, 2, 300, 64),
    Shape("many views", 256, 16, 1024, 128, stacked=True),
    Shape("a decoder's step over its modalities", 512, 4, 512, 128, query=True),
)
SMALL = (
    Shape("one utterance", 1, 3, 300, 64),
    Shape("a batch of utterances, narrow", 64, 4, 20, 32),
    Shape("one utterance, sixteen views", 1, 16, 1024, 128, stacked=True),
)


def parts(leaves: tuple[Tensor, ...], shape: Shape) -> tuple[Tensor | list[Tensor], tuple[Tensor, ...]]:
    count = 1 if shape.stacked else shape.modalities
    return leaves[0] if shape.stacked else list(leaves[:count]), leaves[count:]


def plain(*leaves: Tensor, shape: Shape, presence: Tensor) -> Tensor:
    xs, (weight, vector, *more) = parts(leaves, shape)
    x = xs if isinstance(xs, Tensor) else torch.stack(xs, 1)
    if not shape.query:
        energies = torch.tanh(F.linear(x, weight)) @ vector
    else:
        bias, query, query_weight = more
        energies = torch.tanh(F.linear(x, weight, bias) + F.linear(query, query_weight).unsqueeze(1)) @ vector
        energies = energies.masked_fill(~presence, -torch.inf)
    return (energies.softmax(1).unsqueeze(-1) * x).sum(1)


def ours(*leaves: Tensor, shape: Shape, presence: Tensor) -> Tensor:
    xs, (weight, vector, *more) = parts(leaves, shape)
    if not shape.query:
        return mmk.additive_attention_pool(xs, weight, vector)[0]
    options = dict(zip(("bias", "query", "query_weight"), more, strict=True))
    return mmk.additive_attention_pool(xs, weight, vector, **options, presence=presence)[0]


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    size = (shape.batch, shape.width)
    xs = [torch.randn(shape.batch, shape.modalities, shape.width)] if shape.stacked else []
    xs += [torch.randn(size) for _ in range(0 if shape.stacked else shape.modalities)]
    tensors = [*xs, torch.randn(shape.hidden, shape.width) * shape.width**-0.5, torch.randn(shape.hidden)]
    names = [*(f"xs[{i}]" for i in range(len(xs))), "weight", "vector"]
    if shape.query:
        tensors += [torch.randn(shape.hidden), torch.randn(size), torch.randn(shape.hidden, shape.width)]
        tensors[-1] *= shape.width**-0.5
        names += ["bias", "query", "query_weight"]
    presence = torch.rand(shape.batch, shape.modalities) > 0.2
    presence[:, 0] = True
    baseline = partial(plain, shape=shape, presence=presence)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=tuple(names),
        ours=partial(ours, shape=shape, presence=presence),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    """The products with the weights."""
    rows = shape.batch * (shape.modalities + shape.query)
    return (6.0 if training else 2.0) * rows * shape.width * shape.hidden


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: modalities and weights read, outputs written. Training also: all of them and the output's gradient read,
    gradients written."""
    inputs = shape.elements + (1 + shape.query) * shape.hidden * shape.width + shape.query * shape.batch * shape.width
    outputs = shape.batch * shape.width
    return itemsize * float(3 * inputs + 2 * outputs if training else inputs + outputs)


def case(group: str, shape: Shape, *, training: bool = False) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
