"""additive_attention_pool in plain PyTorch: the specification every kernel is tested against.

    e_i = v · tanh(W x_i + W_q q + b),  a = softmax over present i of e,  pooled = Σ_i a_i x_i

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._pool import softmax_over_present, stacked
from mmkernels.ops._products import linear, matmul


def additive_attention_pool(
    xs: Sequence[Tensor],  # one of [B, M, D], or M of [B, D]
    weight: Tensor,  # [A, D]
    vector: Tensor,  # [A]
    bias: Tensor | None,  # [A]
    query: Tensor | None,  # [B, Dq]
    query_weight: Tensor | None,  # [A, Dq]
    presence: Tensor | None,  # [B, M] or [M] bool
) -> tuple[Tensor, Tensor]:
    """Pooled [B, D] and weights a [B, M]; zeros where every modality is absent."""
    x, absent = stacked(xs, presence)
    activations = _activations(x, weight, bias, query, query_weight)
    energies = matmul(activations, vector.unsqueeze(-1)).squeeze(-1)  # [B, M]
    weights = softmax_over_present(energies.unsqueeze(-1), absent)  # [B, M, 1]
    return (weights * x).sum(1), weights.squeeze(-1)


def _activations(
    x: Tensor, weight: Tensor, bias: Tensor | None, query: Tensor | None, query_weight: Tensor | None
) -> Tensor:
    """tanh(W x_i + W_q q + b), [B, M, A]."""
    u = linear(x, weight)
    if bias is not None:
        u = u + bias
    if query is not None and query_weight is not None:
        u = u + linear(query, query_weight).unsqueeze(1)
    return torch.tanh(u)


def saved_activations(
    xs: Sequence[Tensor],
    weight: Tensor,
    vector: Tensor,
    bias: Tensor | None,
    query: Tensor | None,
    query_weight: Tensor | None,
    presence: Tensor | None,
) -> tuple[Tensor]:
    """[B, M·A], 0 where a modality is absent."""
    x, absent = stacked(xs, presence)
    activations = _activations(x, weight, bias, query, query_weight)
    return ((activations if absent is None else activations.masked_fill(absent, 0)).flatten(1),)


def example_inputs(draw: Draw, B: int = 5, M: int = 3, D: int = 6, A: int = 4, Q: int = 5) -> Examples:
    return {
        "a query": {
            "xs": draw(B, M, D),
            "weight": draw(A, D),
            "vector": draw(A),
            "bias": draw(A),
            "query": draw(B, Q),
            "query_weight": draw(A, Q),
            "presence": draw.flags(B, M),
        },
        "a list": {  # of more rows than one task takes
            "xs": [draw(14 * B, D), draw(14 * B, D)],
            "weight": draw(A, D),
            "vector": draw(A),
            "presence": draw.flags(14 * B, 2),
        },
    }
