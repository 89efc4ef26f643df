"""bidirectional_cross_attention in plain PyTorch: the specification every kernel is tested against.

    S = clamp(scale · X Yᵀ),  x_out = softmax over y (S) · y_value,  y_out = softmax over x (Sᵀ) · x_value

Runs on every device and dtype, differentiable any number of times. Products are formed in the inputs' dtype, as plain
torch code would; what is between them in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import matmul


def bidirectional_cross_attention(
    x_query: Tensor,  # [B, H, Lx, D]
    y_key: Tensor,  # [B, H, Ly, D]
    x_value: Tensor,  # [B, H, Lx, Dv]
    y_value: Tensor,  # [B, H, Ly, Dv]
    x_mask: Tensor | None,  # [B, Lx] bool, True = real
    y_mask: Tensor | None,  # [B, Ly]
    scale: float | None,
    clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, Lx, Dv] and [B, H, Ly, Dv].

    What is not finite in a padded token counts as zero. Where all tokens of the other side are padding, the output and
    its gradients are zero.
    """
    scores = _scores(x_query, y_key, x_mask, y_mask, scale, clamp)
    x_value, y_value = _clean(x_value, x_mask), _clean(y_value, y_mask)
    return _attend(scores, y_mask, y_value), _attend(scores.mT, x_mask, x_value)


def softmax_stats(
    x_query: Tensor, y_key: Tensor, x_value: Tensor, y_value: Tensor, x_mask: Any, y_mask: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    """Of x [3, B, H, Lx] and of y [3, B, H, Ly]: row_max, log_sum and 0, −inf where there is nothing to attend to."""
    scores = _scores(x_query, y_key, x_mask, y_mask, *options)
    return _stats(scores, y_mask), _stats(scores.mT, x_mask)


def _stats(scores: Tensor, mask: Tensor | None) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full((3, *scores.shape[:-1]), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    row_max = scores.amax(-1)
    idle = row_max == -torch.inf
    log_sum = (scores - row_max.masked_fill(idle, 0).unsqueeze(-1)).exp().sum(-1).log()
    return torch.stack([row_max, log_sum, torch.zeros_like(row_max)])


def _scores(
    x_query: Tensor,
    y_key: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    scale: float | None,
    clamp: float | None,
) -> Tensor:
    """[B, H, Lx, Ly], float32 or float64."""
    x_query, y_key = _clean(x_query, x_mask), _clean(y_key, y_mask)
    wide = torch.float64 if x_query.dtype == torch.float64 else torch.float32
    if scale is None:
        scale = max(x_query.shape[-1], 1) ** -0.5
    scores = (matmul(x_query, y_key.mT) * scale).to(wide)
    return scores if clamp is None else scores.clamp(-clamp, clamp)


def _clean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens if mask is None else tokens.masked_fill(~mask[:, None, :, None] & ~tokens.isfinite(), 0)


def _attend(scores: Tensor, mask: Tensor | None, value: Tensor) -> Tensor:
    """softmax(scores [B, H, L, keys]) · value, over the keys that are real."""
    if mask is None:
        return matmul(scores.softmax(-1).to(value.dtype), value)
    hidden = ~mask[:, None, None, :]
    idle = hidden.all(-1, keepdim=True)  # nothing to attend to
    weights = scores.masked_fill(hidden & ~idle, -torch.inf).softmax(-1)
    return matmul(weights.to(value.dtype), value).masked_fill(idle, 0)


def example_inputs(draw: Draw, B: int = 2, H: int = 2, Lx: int = 6, Ly: int = 4, D: int = 8, Dv: int = 4) -> Examples:
    masks = {"x_mask": draw.flags(B, Lx), "y_mask": draw.flags(B, Ly)}
    options: dict[str, dict[str, Any]] = {"masks": masks, "clamped": {"scale": 2.0, "clamp": 0.8}}
    return {
        option: {
            "x_query": draw(B, H, Lx, D),
            "y_key": draw(B, H, Ly, D),
            "x_value": draw(B, H, Lx, Dv),
            "y_value": draw(B, H, Ly, Dv),
            **given,
        }
        for option, given in options.items()
    }
