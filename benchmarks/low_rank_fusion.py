"""low_rank_fusion: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "products of matmuls"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    widths: tuple[int, ...]
    outputs: int
    rank: int

    def __str__(self) -> str:
        return f"{self.batch}x{'+'.join(map(str, self.widths))} n{self.outputs} r{self.rank}"

    @property
    def entries(self) -> int:
        return sum(width + 1 for width in self.widths)


SHAPES = (
    Shape("sentiment, one utterance", 1, (32, 32, 32), 64, 4),
    Shape("sentiment, a small batch", 32, (32, 32, 32), 64, 4),
    Shape("uneven modalities, a small batch", 32, (20, 5, 74), 128, 16),
    Shape("two modalities", 256, (64, 64), 128, 8),
    Shape("raw features of text, audio, video", 256, (300, 74, 35), 256, 16),
    Shape("uneven modalities, a large batch", 2048, (20, 5, 74), 128, 16),
)


def split(leaves: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    count = len(leaves) // 2 - 1
    return list(leaves[:count]), list(leaves[count : 2 * count]), leaves[-2], leaves[-1]


def eager(*leaves: Tensor) -> Tensor:
    """As the paper's code has it: one batched product per modality, their product, a weighted sum over the ranks."""
    xs, factors, rank_weights, bias = split(leaves)
    product: Tensor | None = None
    for x, factor in zip(xs, factors, strict=True):
        projection = torch.matmul(torch.cat([torch.ones_like(x[:, :1]), x], 1), factor)  # [R, B, N]
        product = projection if product is None else product * projection
    assert product is not None
    return torch.matmul(rank_weights.unsqueeze(0), product.permute(1, 0, 2)).squeeze(1) + bias


def ours(*leaves: Tensor) -> Tensor:
    return mmk.low_rank_fusion(*split(leaves))


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    xs = [torch.randn(shape.batch, width) for width in shape.widths]
    factors = [torch.randn(shape.rank, width + 1, shape.outputs) / (width + 1) ** 0.5 for width in shape.widths]
    leaves = (*xs, *factors, torch.randn(shape.rank), torch.randn(shape.outputs))
    names = [f"{kind}{i}" for kind in ("x", "factor") for i in range(len(xs))]
    return Problem(
        leaves=tuple(t.to(dtype).requires_grad_(training) for t in leaves),
        names=(*names, "rank_weights", "bias"),
        ours=ours,
        torch=eager,
        eager=eager,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and writes every gradient."""
    inputs = shape.batch * sum(shape.widths) + shape.rank * shape.entries * shape.outputs
    outputs = shape.batch * shape.outputs
    return itemsize * float(3 * inputs + 2 * outputs if training else inputs + outputs)


def case(shape: Shape, *, training: bool) -> Case:
    """The flops of a training pass are those of plain code; ours forms the projections a second time beside them."""
    product = 2 * shape.batch * shape.rank * shape.entries * shape.outputs
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=float(3 * product if training else product),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    return [case(shape, training=training) for training in (False, True) for shape in SHAPES]
