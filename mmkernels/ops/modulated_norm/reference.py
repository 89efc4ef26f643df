"""modulated_norm in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

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


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: patches of an image, and what a text says of their scale and shift."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {"x": random(2, 49, 64), "shift": random(2, 64), "scale": random(2, 64)}
