"""concat_tokens on NVIDIA GPUs, in CUDA C++: csrc/concat_tokens/concat_tokens_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library, aligned
from mmkernels.ops._norm import NORMS
from mmkernels.ops.concat_tokens.op import Arguments

_FORWARD_TEAMS = 16384  # a few rows each, so that no multiprocessor waits long for the last
_BACKWARD_TEAMS = 2048  # several at a time for every multiprocessor of a large GPU, and few sums for torch to add up


def _split(xs: Sequence[Tensor], teams: int, least: int) -> tuple[int, int]:
    """Positions and batch elements per team: of the batch not less than ``least``, and all of it before a second
    position."""
    batch = max(xs[0].shape[0], 1)
    each = min(max(batch * sum(x.shape[1] for x in xs) // teams, 1), 64)
    share = min(max(each, least), batch)
    return max(each // share, 1), share


def forward(kernels: Library, a: Arguments, training: bool) -> Tensor:
    xs, type_embedding, position_embeddings, position_sources, norm, norm_weight, norm_bias, eps, out_dtype = a
    batch, _, features = xs[0].shape
    out = xs[0].new_empty((batch, sum(x.shape[1] for x in xs), features), dtype=out_dtype)
    if out.numel():
        arguments = (
            xs,
            type_embedding,
            position_embeddings,
            position_sources,
            NORMS.index(norm),
            norm_weight,
            norm_bias,
        )
        kernels("concat_tokens_fwd", out, *arguments, eps, *_split(xs, _FORWARD_TEAMS, 1))
    return out


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    xs, type_embedding, position_embeddings, position_sources, norm, norm_weight, norm_bias, eps, _ = a
    (g,) = grads
    batch, _, features = g.shape
    dtype = xs[0].dtype
    needs_x, needs_rest = needed[: len(xs)], needed[len(xs) :]
    needs_type, *needs_position, needs_weight, needs_bias = needs_rest
    run, share = _split(xs, _BACKWARD_TEAMS, 4 if position_embeddings else 1)
    teams, shares = [-(-x.shape[1] // run) for x in xs], -(-batch // share)

    def sums(wanted: bool) -> Tensor | None:
        """Where each team puts its sum."""
        return g.new_empty((shares, sum(teams), features), dtype=torch.float32) if wanted else None

    def of_position(wanted: bool, embedding: Tensor) -> Tensor:
        """Where the gradient of a position embedding goes, or its sum over each share of the batch."""
        if not wanted:
            return g.new_empty(0)
        if shares == 1:
            return g.new_empty(embedding.shape, dtype=dtype)
        return g.new_empty((shares, *embedding.shape), dtype=torch.float32)

    dxs = [x.new_empty(x.shape) if n else g.new_empty(0) for x, n in zip(xs, needs_x, strict=True)]
    dpositions = [of_position(n, p) for n, p in zip(needs_position, position_embeddings, strict=True)]
    dtypes, dweight, dbias = map(sums, (needs_type, needs_weight, needs_bias))
    if g.numel():
        arguments = (
            xs,
            type_embedding,
            position_embeddings,
            position_sources,
            NORMS.index(norm),
            norm_weight,
            norm_bias,
        )
        outputs = (dxs, dpositions, dtypes, dweight, dbias)
        kernels("concat_tokens_bwd", aligned(g), *arguments, eps, run, share, *outputs)
    dtypes = None if dtypes is None else torch.stack([t.sum((0, 1)) for t in dtypes.split(teams, 1)])
    dpositions = [p.sum(0).to(dtype) if p.dim() == 3 else p for p in dpositions]
    dweight, dbias = (None if t is None else t.sum((0, 1)) for t in (dweight, dbias))
    shared = [g.new_empty(0) if t is None else t.to(dtype) for t in (dtypes, dweight, dbias)]
    return [*dxs, shared[0], *dpositions, *shared[1:]]
