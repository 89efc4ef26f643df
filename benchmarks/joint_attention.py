"""joint_attention: what is measured, and against what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch cat, SDPA, split"


@dataclass(frozen=True)
class Shape:
    """Lengths of the query streams, and of the key streams where those are others."""

    note: str
    batch: int
    heads: int
    queries: tuple[int, ...]
    dim: int
    sources: tuple[int, ...] = ()

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.queries))
        if self.sources:
            lengths += f" over {'+'.join(map(str, self.sources))}"
        return f"{self.batch}x{self.heads} {lengths} d{self.dim}"

    @property
    def keys(self) -> tuple[int, ...]:
        return self.sources or self.queries


# Text beside image latents, as diffusion transformers have them, and one stream that reads several others.
SHAPES = (
    Shape("77+77 prompt tokens, 512² image", 1, 8, (154, 1024), 64),
    Shape("captions, text, ViT-B 24x24 patches", 2, 12, (32, 77, 576), 64),
    Shape("128 prompt tokens, wide heads", 1, 24, (128, 512), 128),
    Shape("text over text, image, audio", 4, 8, (64,), 64, (64, 196, 120)),
    Shape("a small batch", 8, 4, (16, 49), 32),
)
# What keeps a GPU busy.
LARGE = (
    Shape("FLUX: 512 prompt tokens, 1024² image", 2, 24, (512, 4096), 128),
    Shape("video latents over text, image, audio", 2, 16, (8192,), 64, (77, 576, 512)),
)


def streams(leaves: tuple[Tensor, ...], shape: Shape) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    queries, keys = len(shape.queries), len(shape.keys)
    return list(leaves[:queries]), list(leaves[queries : queries + keys]), list(leaves[queries + keys :])


def ours(*leaves: Tensor, shape: Shape) -> Tensor:
    """Outputs are used stream by stream; one sum makes a single tensor of them, for either side alike."""
    return total(mmk.joint_attention(*streams(leaves, shape)))


def sdpa(*leaves: Tensor, shape: Shape) -> Tensor:
    """The streams concatenated, attended to, and split again into tensors of their own."""
    joined = (torch.cat(x, 2) for x in streams(leaves, shape))
    return total([o.contiguous() for o in F.scaled_dot_product_attention(*joined).split(list(shape.queries), 2)])


def eager(*leaves: Tensor, shape: Shape) -> Tensor:
    query, key, value = (torch.cat(x, 2) for x in streams(leaves, shape))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).softmax(
        -1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return total(list((scores.to(query.dtype) @ value).split(list(shape.queries), 2)))


def total(outs: list[Tensor]) -> Tensor:
    """The sum over the tokens of every stream, [B, H, Dv]."""
    sums = [o.sum(2) for o in outs]
    return torch.stack(sums).sum(0)


def problem(shape: Shape, training: bool, dtype: torch.dtype) -> Problem:
    lengths = (*shape.queries, *shape.keys, *shape.keys)
    counts = {"query": len(shape.queries), "key": len(shape.keys), "value": len(shape.keys)}
    return Problem(
        leaves=tuple(
            torch.randn(shape.batch, shape.heads, n, shape.dim).to(dtype).requires_grad_(training) for n in lengths
        ),
        names=tuple(f"{kind}{i}" for kind, count in counts.items() for i in range(count)),
        ours=partial(ours, shape=shape),
        torch=partial(sdpa, shape=shape),
        eager=partial(eager, shape=shape),
    )


def bytes_moved(shape: Shape, training: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and the output's gradient."""
    features = shape.batch * shape.heads * shape.dim
    queries, keys = features * sum(shape.queries), 2 * features * sum(shape.keys)
    forward, backward = 2 * queries + keys, 4 * queries + 2 * keys
    return itemsize * float(forward + backward if training else forward)


def case(shape: Shape, *, training: bool) -> Case:
    """Two products forward, five more backward."""
    pairs = shape.batch * shape.heads * sum(shape.queries) * sum(shape.keys)
    return Case(
        group="training" if training else "forward",
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training),
        flops=2.0 * pairs * shape.dim * (7 if training else 2),
        bytes=partial(bytes_moved, shape, training),
        training=training,
        gpu=shape in LARGE,
        quick=shape is SHAPES[-1],
    )


def cases() -> list[Case]:
    return [case(shape, training=training) for training in (False, True) for shape in (*SHAPES, *LARGE)]
