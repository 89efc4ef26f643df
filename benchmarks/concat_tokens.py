"""concat_tokens: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch add, cat, norm"


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    lengths: tuple[int, ...]
    features: int
    norm: Literal["layer", "rms"] | None = "layer"
    embeddings: bool = True

    def __str__(self) -> str:
        added = "types and positions, " if self.embeddings else ""
        return f"{self.batch}x({'+'.join(map(str, self.lengths))})x{self.features} {added}{self.norm or 'no'} norm"

    @property
    def rows(self) -> int:
        return self.batch * sum(self.lengths)


SHAPES = (
    Shape("ViLT: text, image patches", 8, (40, 200), 768),
    Shape("text, image, audio", 8, (40, 200, 25), 768),
    Shape("long context, one sequence", 1, (2048, 1024), 1024, norm="rms"),
    Shape("video and text, no norm", 4, (784, 64), 1024, norm=None),
    Shape("small: sentiment from three summaries", 32, (1, 1, 1), 128),
)
# What keeps a GPU busy.
LARGE = (Shape("video, text and audio of a large model", 16, (4096, 256, 512), 1024),)


def split(shape: Shape, leaves: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor | None, list[Tensor], list[Tensor]]:
    """Leaves as tokens, types, positions and the affine weights of the norm."""
    m = len(shape.lengths)
    xs, rest = list(leaves[:m]), leaves[m:]
    types, positions = (rest[0], list(rest[1 : m + 1])) if shape.embeddings else (None, [])
    return xs, types, positions, list(rest[m + 1 :] if shape.embeddings else rest)


def eager(*leaves: Tensor, shape: Shape) -> Tensor:
    xs, types, positions, affine = split(shape, leaves)
    if types is not None:
        xs = [x + types[i] + p for i, (x, p) in enumerate(zip(xs, positions, strict=True))]
    out = torch.cat(xs, 1)
    if shape.norm == "layer":
        return F.layer_norm(out, out.shape[-1:], *affine)
    return F.rms_norm(out, out.shape[-1:], *affine, eps=1e-5) if shape.norm else out


def ours(*leaves: Tensor, shape: Shape) -> Tensor:
    xs, types, positions, affine = split(shape, leaves)
    weights = dict(zip(("norm_weight", "norm_bias"), affine, strict=False))
    return mmk.concat_tokens(
        xs, type_embedding=types, position_embeddings=positions or None, norm=shape.norm, **weights
    )


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    c, m = shape.features, len(shape.lengths)
    sizes: list[tuple[int, ...]] = [(shape.batch, n, c) for n in shape.lengths]
    names = [f"xs[{i}]" for i in range(m)]
    if shape.embeddings:
        sizes += [(m, c), *((n, c) for n in shape.lengths)]
        names += ["type_embedding", *(f"position_embeddings[{i}]" for i in range(m))]
    affine = {"layer": ["norm_weight", "norm_bias"], "rms": ["norm_weight"], None: []}[shape.norm]
    sizes += [(c,)] * len(affine)
    plain = partial(eager, shape=shape)
    return Problem(
        leaves=tuple(torch.randn(s).to(dtype).requires_grad_(training) for s in sizes),
        names=(*names, *affine),
        ours=partial(ours, shape=shape),
        torch=plain,
        eager=plain,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Tokens in and out and the positions; backward: tokens and gradient in, gradients out."""
    tokens, positions = shape.rows * shape.features, sum(shape.lengths) * shape.features * shape.embeddings
    return itemsize * float((5 * tokens + 3 * positions) if training else (2 * tokens + positions))


def case(shape: Shape, training: bool = False) -> Case:
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=shape.rows * shape.features * (26.0 if training else 10.0),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    return [case(s, training) for training in (False, True) for s in (*SHAPES, *LARGE)]
