"""multiplicative_attention_pool: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "stack, matmul, softmax, sum"


@dataclass(frozen=True)
class Shape:
    """Rows, modalities and their width; the width of the query where it has a weight."""

    note: str
    batch: int
    modalities: int
    width: int
    query: int | None = None

    def __str__(self) -> str:
        weight = "" if self.query is None else f" query {self.query}"
        return f"{self.batch}x{self.modalities}x{self.width}{weight}"

    @property
    def weights(self) -> int:
        return 0 if self.query is None else self.query * self.width


SHAPES = (
    Shape("text, audio, video under a question", 4096, 3, 512, 512),
    Shape("two pooled encoders, dot products", 4096, 2, 300),
    Shape("many views under a question", 256, 16, 1024, 512),
)
SMALL = (
    Shape("one utterance under a question", 1, 3, 300, 300),
    Shape("a batch of utterances, narrow", 64, 4, 20),
)


def parts(leaves: tuple[Tensor, ...], shape: Shape) -> tuple[list[Tensor], Tensor, Tensor | None]:
    xs, (query, *weight) = leaves[: shape.modalities], leaves[shape.modalities :]
    return list(xs), query, weight[0] if weight else None


def plain(*leaves: Tensor, shape: Shape) -> Tensor:
    xs, query, weight = parts(leaves, shape)
    x = torch.stack(xs, 1)
    projected = query if weight is None else query @ weight
    energies = (x @ projected.unsqueeze(-1)).squeeze(-1) * shape.width**-0.5
    return (energies.softmax(1).unsqueeze(-1) * x).sum(1)


def ours(*leaves: Tensor, shape: Shape) -> Tensor:
    xs, query, weight = parts(leaves, shape)
    return mmk.multiplicative_attention_pool(xs, query, weight=weight)[0]


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    xs = [torch.randn(shape.batch, shape.width) for _ in range(shape.modalities)]
    tensors = [*xs, torch.randn(shape.batch, shape.query or shape.width)]
    names = [*(f"xs[{i}]" for i in range(len(xs))), "query"]
    if shape.query is not None:
        tensors.append(torch.randn(shape.query, shape.width) * shape.query**-0.5)
        names.append("weight")
    baseline = partial(plain, shape=shape)
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in tensors),
        names=tuple(names),
        ours=partial(ours, shape=shape),
        torch=baseline,
        eager=baseline,
    )


def flops(shape: Shape, training: bool) -> float:
    """The product with the weight, and those of every modality with the query and its weight."""
    forward = 2.0 * shape.batch * (shape.weights + 2 * shape.modalities * shape.width)
    return 3 * forward if training else forward


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Forward: inputs read, outputs written. Training also: inputs and the output's gradient read, gradients
    written.
    """
    inputs = shape.batch * (shape.modalities * shape.width + (shape.query or shape.width)) + shape.weights
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
        quick=shape is SMALL[0],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
