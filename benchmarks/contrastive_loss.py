"""contrastive_loss: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "both products, cross_entropy of each"


@dataclass(frozen=True)
class Shape:
    """Pairs and features."""

    note: str
    pairs: int
    features: int

    def __str__(self) -> str:
        return f"{self.pairs}x{self.features}"


SHAPES = (Shape("a batch of CLIP", 2048, 512), Shape("many small embeddings", 4096, 256))
SMALL = (Shape("a batch of a GPU", 64, 128),)


def plain(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x))
    return (F.cross_entropy(scale * x @ y.T, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    x, y = (F.normalize(torch.randn(shape.pairs, shape.features), dim=-1).to(dtype) for _ in range(2))
    scale = torch.tensor(14.0, dtype=dtype)
    leaves = tuple(t.requires_grad_(training) for t in (x, y, scale))
    return Problem(leaves=leaves, names=("x", "y", "logit_scale"), ours=mmk.contrastive_loss, torch=plain, eager=plain)


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Both sides read; backward: both read, both gradients written."""
    return itemsize * float(shape.pairs * shape.features * (6 if training else 2))


def case(group: str, shape: Shape, *, training: bool = False) -> Case:
    products = 2.0 * shape.pairs**2 * shape.features
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=products * (3 if training else 1),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        quick=shape is SMALL[0],
    )


def cases() -> list[Case]:
    rows = [case("forward", s) for s in SHAPES] + [case("training", s, training=True) for s in SHAPES]
    rows += [case("small forward", s) for s in SMALL] + [case("small training", s, training=True) for s in SMALL]
    return rows
