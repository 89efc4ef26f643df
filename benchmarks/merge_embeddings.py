"""merge_embeddings: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "masked_scatter"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    length: int
    features: int
    inserted: int  # consecutive places in each batch element

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.features}, {self.inserted} inserted"

    def mask(self) -> Tensor:
        mask = torch.zeros(self.batch, self.length, dtype=torch.bool)
        start = (self.length - self.inserted) // 2
        mask[:, start : start + self.inserted] = True
        return mask


SHAPES = (
    Shape("LLaVA, 24x24 patches", 4, 1024, 2048, 576),
    Shape("a small VLM, 8x8 patches", 8, 128, 960, 64),
    Shape("prompt of one image", 1, 640, 4096, 576),
)
# What keeps a GPU busy.
LARGE = (Shape("LLaVA-Next 7B, tiles of an image", 8, 4096, 4096, 2880),)


def eager(text: Tensor, modal: Tensor, *, mask: Tensor) -> Tensor:
    return text.masked_scatter(mask.unsqueeze(-1), modal)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    sizes = ((shape.batch, shape.length, shape.features), (shape.batch * shape.inserted, shape.features))
    plain = partial(eager, mask=shape.mask())
    return Problem(
        leaves=tuple(torch.randn(s).to(dtype).requires_grad_(training) for s in sizes),
        names=("text", "modal"),
        ours=partial(mmk.merge_embeddings, mask=shape.mask()),
        torch=plain,
        eager=plain,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Every row is read and written once a pass; backward also zeroes the rows of text that were replaced."""
    rows, inserted = shape.batch * shape.length, shape.batch * shape.inserted
    return itemsize * shape.features * float(4 * rows + inserted if training else 2 * rows)


def case(shape: Shape, training: bool = False) -> Case:
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=0.0,
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    return [case(s) for s in (*SHAPES, *LARGE)] + [case(s, training=True) for s in (*SHAPES[1:], *LARGE)]
