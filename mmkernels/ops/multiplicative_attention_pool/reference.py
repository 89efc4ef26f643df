"""multiplicative_attention_pool in plain PyTorch: the specification every kernel is tested against.

    e_i = scale · qᵀ W x_i,  a = softmax over present i of e,  pooled = Σ_i a_i x_i

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._pool import softmax_over_present, stacked
from mmkernels.ops._products import matmul


def multiplicative_attention_pool(
    xs: Sequence[Tensor],  # one of [B, M, D], or M of [B, D]
    query: Tensor,  # [B, Dq], without a weight [B, D]
    weight: Tensor | None,  # [Dq, D]
    scale: float,
    presence: Tensor | None,  # [B, M] or [M] bool
) -> tuple[Tensor, Tensor]:
    """Pooled [B, D] and weights a [B, M]; zeros where every modality is absent."""
    x, absent = stacked(xs, presence)
    projected = query if weight is None else matmul(query, weight)  # [B, D]
    energies = scale * matmul(x, projected.unsqueeze(-1))  # [B, M, 1]
    weights = softmax_over_present(energies, absent)
    return (weights * x).sum(1), weights.squeeze(-1)


def example_inputs(draw: Draw, B: int = 5, M: int = 3, D: int = 6, Q: int = 5) -> Examples:
    return {
        "a weight": {"xs": draw(B, M, D), "query": draw(B, Q), "weight": draw(Q, D), "presence": draw.flags(B, M)},
        "a list": {"xs": [draw(B, D), draw(B, D)], "query": draw(B, D)},
    }
