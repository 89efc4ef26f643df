"""modulated_norm in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._norm import normalize


def modulated_norm(
    x: Tensor,  # [B, L, C]
    shift: Tensor,  # [B, C] or [B, 1 or L, C]
    scale: Tensor,  # alike
    norm: str | None,
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
) -> Tensor:
    """norm(x) ∘ (1 + scale) + shift, per token."""
    shift, scale = (t.unsqueeze(1) if t.dim() == 2 else t for t in (shift, scale))
    return normalize(x, norm, norm_weight, norm_bias, eps) * (1 + scale) + shift


def example_inputs(draw: Draw, B: int = 3, L: int = 4, C: int = 6) -> Examples:
    return {
        "layer norm": {
            "x": draw(B, L, C),
            "shift": draw(B, C),
            "scale": draw(B, C),
            "norm_weight": draw(C),
            "norm_bias": draw(C),
        },
        "RMSNorm": {"x": draw(B, L, C), "shift": draw(B, L, C), "scale": draw(B, L, C), "norm": "rms"},
        "no norm": {"x": draw(B, L, C), "shift": draw(B, C), "scale": draw(B, L, C), "norm": None},
    }
