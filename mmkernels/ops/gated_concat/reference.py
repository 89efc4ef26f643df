"""gated_concat in plain PyTorch: the specification every kernel is tested against.

    g = σ([x; y] Wᵀ + b),  out = [g ∘ x; y; s],  s = Σ_k g_k x_k

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times. It builds the concatenation
that the gate reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear


def gated_concat(
    x: Tensor,  # [*, Kx]
    y: Tensor,  # [*, Ky]
    weight: Tensor,  # [Kx, Kx + Ky], or [1, Kx + Ky]: one gate for all features
    bias: Tensor | None,  # [Kx] or [1]
) -> Tensor:
    """Output [*, Kx + Ky + 1]."""
    gated = gate(x, y, weight, bias) * x
    return torch.cat([gated, y, gated.sum(-1, keepdim=True)], -1)


def gate(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """g, [*, Kx or 1]."""
    return torch.sigmoid(linear(torch.cat([x, y], -1), weight, bias))


def example_inputs(draw: Draw, B: int = 5, Kx: int = 6, Ky: int = 4) -> Examples:
    return {"a bias": {"x": draw(B, Kx), "y": draw(B, Ky), "weight": draw(Kx, Kx + Ky), "bias": draw(Kx)}}
