"""bidirectional_cross_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "two softmaxes over one score matrix"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    heads: int
    x: int
    y: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads} {self.x}x{self.y} d{self.dim}"


# Image tokens by text tokens, as grounding models have them.
SHAPES = (
    Shape("one level of features, a caption", 1, 4, 5000, 64, 256),
    Shape("900 queries, 128 words", 2, 8, 900, 128, 64),
    Shape("all levels of features, a long prompt", 1, 4, 20000, 256, 64),
    Shape("two equal sequences", 2, 8, 512, 512, 64),
    Shape("a small batch", 8, 4, 49, 16, 32),
)
# What keeps a GPU busy.
LARGE = (
    Shape("all levels of features, a batch of long prompts", 8, 4, 20000, 256, 256),
    Shape("two long sequences", 4, 8, 4096, 4096, 64),
)


def ours(x_query: Tensor, y_key: Tensor, x_value: Tensor, y_value: Tensor) -> Tensor:
    """Both outputs are used; one sum makes a single tensor of them, for either side alike."""
    x_out, y_out = mmk.bidirectional_cross_attention(x_query, y_key, x_value, y_value)
    return x_out.sum(2) + y_out.sum(2)


def eager(x_query: Tensor, y_key: Tensor, x_value: Tensor, y_value: Tensor) -> Tensor:
    """As the models' own code has it: one product, a softmax over its rows and one over its columns."""
    scores = x_query @ y_key.mT * x_query.shape[-1] ** -0.5
    x_out = scores.softmax(-1) @ y_value
    y_out = scores.mT.softmax(-1) @ x_value
    return x_out.sum(2) + y_out.sum(2)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    lengths = (shape.x, shape.y, shape.x, shape.y)
    return Problem(
        leaves=tuple(
            torch.randn(shape.batch, shape.heads, n, shape.dim).to(dtype).requires_grad_(training) for n in lengths
        ),
        names=("x_query", "y_key", "x_value", "y_value"),
        ours=ours,
        torch=eager,
        eager=eager,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and the outputs' gradients."""
    tokens = shape.batch * shape.heads * shape.dim * (shape.x + shape.y)
    return itemsize * float(9 * tokens if training else 3 * tokens)


def case(shape: Shape, *, training: bool) -> Case:
    """Three products forward; the flops of a training pass are those of plain code, which forms S but once."""
    product = 2.0 * shape.batch * shape.heads * shape.x * shape.y * shape.dim
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=product * (9 if training else 3),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=shape is SHAPES[-1],
    )


def cases() -> list[Case]:
    return [case(shape, training=training) for training in (False, True) for shape in (*SHAPES, *LARGE)]
