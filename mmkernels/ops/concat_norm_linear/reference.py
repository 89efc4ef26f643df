"""concat_norm_linear in plain PyTorch: the specification every kernel is tested against.

    c = [x₁; …; x_M],  layer: n = (c − mean) / √(var + eps) ∘ g + h,  rms: n = c / √(mean(c²) + eps) ∘ g + h,
    y = act(n Wᵀ + b)

Runs on every device and dtype, differentiable any number of times. The norm is torch's: for half-precision inputs it
computes in float32 and rounds its result. It builds the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._norm import layer_norm
from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import activate


def concat_norm_linear(
    xs: Sequence[Tensor],  # M of [*, K_i]
    norm_weight: Tensor,  # [K], K = ΣK_i
    norm_bias: Tensor | None,  # [K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    norm: str,  # "layer" or "rms"
    eps: float,
    activation: str | None,
) -> Tensor:
    """Output [*, N]."""
    return activate(projection(xs, norm_weight, norm_bias, weight, bias, norm, eps), activation)


def projection(
    xs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    """The linear layer over the normalised features, [*, N]."""
    features = torch.cat(list(xs), -1)  # [*, K]
    if norm == "layer":
        normalised = layer_norm(features, norm_weight, norm_bias, eps)
    else:
        normalised = F.rms_norm(features, norm_weight.shape, norm_weight, eps)
        normalised = normalised if norm_bias is None else normalised + norm_bias
    return linear(normalised, weight, bias)


def statistics(xs: Sequence[Tensor], norm: str, eps: float) -> Tensor:
    """Mean (0 for rms) and 1/standard deviation (1/root mean square) of each row, [rows, 2] float32."""
    features = torch.cat(list(xs), -1)
    features = features.flatten(0, -2) if features.dim() > 1 else features[None]  # [rows, K]
    features = features.double()
    mean = features.mean(-1, keepdim=True) if norm == "layer" else features.new_zeros(features.shape[0], 1)
    inverse_std = torch.rsqrt((features - mean).square().mean(-1, keepdim=True) + eps)
    return torch.cat([mean, inverse_std], -1).float()


def example_inputs(draw: Draw, B: int = 5, K: int = 6, N: int = 7) -> Examples:
    return {
        "layer norm": {
            "xs": [draw(B, K), draw(B, 4)],
            "norm_weight": draw(K + 4),
            "norm_bias": draw(K + 4),
            "weight": draw(N, K + 4),
            "bias": draw(N),
            "activation": "silu",
        },
        "RMSNorm": {
            "xs": [draw(B, K), draw(B, 4)],
            "norm_weight": draw(K + 4),
            "norm_bias": None,
            "weight": draw(N, K + 4),
            "norm": "rms",
        },
    }
