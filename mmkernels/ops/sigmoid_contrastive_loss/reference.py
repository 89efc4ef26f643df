"""sigmoid_contrastive_loss in plain PyTorch: the specification every kernel is tested against.

    loss = −1 / total · Σ_ij log σ(l_ij · (logit_scale · x_i·y_j + logit_bias)),  l = 1 of a pair, −1 elsewhere

Runs on every device and dtype, differentiable any number of times. The product is formed in the inputs' dtype, as plain
torch code would; everything after it in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops._contrastive import accumulation_dtype
from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import matmul


def sigmoid_contrastive_loss(
    x: Tensor,  # [n, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # [] float32 or float64
    logit_bias: Tensor,  # []
    first_target: int,
    total: int,
    *_: Any,
) -> Tensor:
    """Loss [], float32 or float64. Row i's pair is column first_target + i; one outside of y is none."""
    logits = matmul(x, y.mT).to(accumulation_dtype(x)) * logit_scale + logit_bias  # [n, N]
    return -F.logsigmoid(torch.where(_pairs(x, y, first_target), logits, -logits)).sum() / max(total, 1)


def _pairs(x: Tensor, y: Tensor, first_target: int) -> Tensor:
    of_row = torch.arange(x.shape[0], device=x.device).unsqueeze(1) + first_target
    return of_row == torch.arange(y.shape[0], device=x.device)  # [n, N]


def unit_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    first_target: int,
    total: int,
    of_x: bool,
    of_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the loss: of x [n, D] and of y [N, D], where they are wanted, and of scale and bias [2], float32
    or float64."""
    x, y = x.to(accumulation_dtype(x)), y.to(accumulation_dtype(y))
    products = x @ y.mT
    logits = products * logit_scale + logit_bias
    of_logits = torch.where(_pairs(x, y, first_target), -(-logits).sigmoid(), logits.sigmoid()) / max(total, 1)
    of_products = of_logits * logit_scale
    of_scalars = torch.stack([(of_logits * products).sum(), of_logits.sum()])
    x_grad = of_products @ y if of_x else x.new_empty(0)
    return x_grad, of_products.mT @ x if of_y else y.new_empty(0), of_scalars


def example_inputs(draw: Draw, B: int = 5, D: int = 4) -> Examples:
    return {
        "plain": {"x": draw(B, D), "y": draw(B, D), "logit_scale": draw.uniform() + 2, "logit_bias": draw() - 2},
        "numbers": {"x": draw(B, D), "y": draw(B, D), "logit_scale": 3.0, "logit_bias": -2.0},
    }
