"""split_attention_pool in plain PyTorch: the specification every kernel is tested against.

    g = Σ x_i over present i,  z = act(W₁ g + b₁),  e = W₂ z + b₂ as [B, M, D],
    a = softmax over present i of e, per feature,  pooled = Σ_i a_i ∘ x_i

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._pool import softmax_over_present, stacked
from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import activate


def split_attention_pool(
    xs: Sequence[Tensor],  # one of [B, M, D], or M of [B, D]
    weight1: Tensor,  # [A, D]
    bias1: Tensor,  # [A]
    weight2: Tensor,  # [M·D, A]
    bias2: Tensor,  # [M·D]
    activation: str | None,
    presence: Tensor | None,  # [B, M] or [M] bool
) -> tuple[Tensor, Tensor]:
    """Pooled [B, D] and weights a [B, M, D]; zeros where every modality is absent."""
    x, absent = stacked(xs, presence)
    z = activate(linear(x.sum(1), weight1, bias1), activation)  # [B, A]
    energies = linear(z, weight2, bias2).view(x.shape)
    weights = softmax_over_present(energies, absent)
    return (weights * x).sum(1), weights


def example_inputs(draw: Draw, B: int = 5, D: int = 6, A: int = 4) -> Examples:
    return {
        "a list, gelu": {
            "xs": [draw(B, D), draw(B, D)],
            "weight1": draw(A, D),
            "bias1": draw(A),
            "weight2": draw(2 * D, A),
            "bias2": draw(2 * D),
            "activation": "gelu",
            "presence": draw.flags(B, 2),
        },
        "silu": {
            "xs": draw(B, 3, D),
            "weight1": draw(A, D),
            "bias1": draw(A),
            "weight2": draw(3 * D, A),
            "bias2": draw(3 * D),
            "activation": "silu",
        },
    }
