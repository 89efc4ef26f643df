"""tensor_fusion_linear in plain PyTorch: the specification every kernel is tested against.

    y = W · vec([1; x₁] ⊗ … ⊗ [1; x_M]) + b,  x_i = 0 where it is absent

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times. It holds the outer product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import where_present


def tensor_fusion_linear(
    xs: Sequence[Tensor],  # M of [B, D_i]
    weight: Tensor,  # [N, Π (D_i + 1)], the first modality's index slowest
    bias: Tensor | None,  # [N]
    presence: Tensor | None = None,  # [B, M] or [M] bool
) -> Tensor:
    """Output [B, N]."""
    one = xs[0].new_ones(xs[0].shape[0], 1)
    fused = one
    for x in where_present(xs, presence):
        factor = torch.cat([one, x], -1)  # [B, D_i + 1]
        fused = (fused.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return linear(fused, weight, bias)


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: embeddings of text, audio and video, as in sentiment analysis."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    widths = (32, 16, 8)
    features = math.prod(width + 1 for width in widths)
    xs = [random(8, width) for width in widths]
    return {"xs": xs, "weight": random(64, features) / features**0.5, "bias": random(64)}
