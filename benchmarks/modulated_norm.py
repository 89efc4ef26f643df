"""modulated_norm: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch norm, multiply, add"
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    note: str
    batch: int
    length: int
    features: int
    norm: Literal["layer", "rms"] | None = "layer"
    per_token: bool = False

    def __str__(self) -> str:
        kind = f"{self.norm or 'FiLM'}{', per token' if self.per_token else ''}"
        return f"{self.batch}x{self.length}x{self.features} {kind}"


SHAPES = (
    Shape("DiT-XL/2, 64x64 latents", 4, 1024, 1152),
    Shape("DiT-B, 32x32 latents", 8, 256, 768),
    Shape("rms, as in Lumina", 1, 1024, 2304, norm="rms"),
    Shape("a timestep for every token", 2, 512, 1536, per_token=True),
    Shape("FiLM of patches by text", 8, 196, 768, norm=None),
)
# What keeps a GPU busy.
LARGE = (
    Shape("DiT-XL/2, 1024x1024 images", 8, 4096, 1152),
    Shape("FLUX", 4, 4608, 3072),
)


def eager(x: Tensor, shift: Tensor, scale: Tensor, *, norm: str | None) -> Tensor:
    if shift.dim() == 2:
        shift, scale = shift[:, None], scale[:, None]
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    elif norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], eps=EPS)
    return x * (1 + scale) + shift


def ours(x: Tensor, shift: Tensor, scale: Tensor, *, norm: Literal["layer", "rms"] | None) -> Tensor:
    return mmk.modulated_norm(x, shift, scale, norm=norm, eps=EPS)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    tokens = (shape.batch, shape.length, shape.features)
    condition = tokens if shape.per_token else (shape.batch, shape.features)
    plain = partial(eager, norm=shape.norm)
    return Problem(
        leaves=tuple(torch.randn(s).to(dtype).requires_grad_(training) for s in (tokens, condition, condition)),
        names=("x", "shift", "scale"),
        ours=partial(ours, norm=shape.norm),
        torch=plain,
        eager=plain,
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Tokens in and out; backward: tokens and gradient in, gradient out; the same of what is per token."""
    tokens = shape.batch * shape.length * shape.features
    condition = 2 * (tokens if shape.per_token else shape.batch * shape.features)
    return itemsize * float((5 * tokens + 3 * condition) if training else (2 * tokens + condition))


def case(shape: Shape, training: bool = False) -> Case:
    tokens = shape.batch * shape.length * shape.features
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=tokens * (24.0 if training else 9.0),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=shape is SHAPES[1],
    )


def cases() -> list[Case]:
    return [case(s, training) for training in (False, True) for s in (*SHAPES, *LARGE)]
