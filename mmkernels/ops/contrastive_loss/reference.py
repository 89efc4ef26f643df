"""contrastive_loss in plain PyTorch: the specification every kernel is tested against.

    z = logit_scale · x yᵀ,  loss = ½ / total · (Σ_i CE(z[i, :], t[i, :]) + Σ_j CE(z[:, j], t'[:, j]))

Runs on every device and dtype, differentiable any number of times. The product is formed in the inputs' dtype, as plain
torch code would; everything after it in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._contrastive import accumulation_dtype
from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import matmul


def contrastive_loss(
    x: Tensor,  # [n, D]
    y: Tensor,  # [N, D]
    logit_scale: Tensor,  # [] float32 or float64
    row_labels: Tensor | None,  # [n] integers
    column_labels: Tensor | None,  # [N] integers
    label_smoothing: float,
    symmetric: bool,
    first_target: int,
    total: int,
    *_: Any,
) -> Tensor:
    """Loss [], float32 or float64.

    Row i's positive is column first_target + i, or with labels every column of an equal one. Symmetric, of a square
    alone: rows over columns and columns over rows; else rows over columns alone, for a caller that adds the rest.
    """
    logits = matmul(x, y.mT).to(accumulation_dtype(x)) * logit_scale  # [n, N]
    positive = None
    if row_labels is not None and column_labels is not None:
        positive = row_labels.unsqueeze(1) == column_labels
    loss = _cross_entropies(logits, positive, first_target, label_smoothing)
    if symmetric:
        loss = loss + _cross_entropies(logits.mT, None if positive is None else positive.mT, 0, label_smoothing)
    return loss / (2 * max(total, 1))


def _cross_entropies(logits: Tensor, positive: Tensor | None, first_target: int, smoothing: float) -> Tensor:
    """Σ_i CE(logits[i, :], t[i, :]): t is 1 shared by a row's positives, smoothed over all columns."""
    rows, columns = logits.shape
    log_p = logits.log_softmax(1)
    if positive is None:
        of_positives = log_p[:, first_target : first_target + rows].diagonal()
    else:
        share = 1 / positive.sum(1, keepdim=True, dtype=log_p.dtype).clamp_min(1)
        of_positives = torch.where(positive, log_p * share, torch.zeros_like(log_p))
    loss = (-(1 - smoothing) * of_positives).sum()
    return loss if smoothing == 0 else loss - (smoothing / max(columns, 1) * log_p).sum()


def softmax_stats(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_labels: Any,
    column_labels: Any,
    smoothing: float,
    symmetric: bool,
    first_target: int,
    total: int,
    keeps_products: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows and, symmetric, of columns, [2, n] and [2, N]: the maximum of the products p, which is not rounded, of −p
    where the scale s is below 0, and Σ e^(|s| (p − it)); and p itself, [n, N], where it is kept."""
    products = matmul(x, y.mT)
    products = torch.where(logit_scale < 0, -products, products)
    kept = products if keeps_products else products.new_empty(0)
    products = products.to(accumulation_dtype(x))

    def stats(p: Tensor) -> Tensor:
        if p.shape[1] == 0:
            return p.new_zeros((2, p.shape[0]))
        top = p.amax(1)
        return torch.stack([top, ((p - top.unsqueeze(1)) * logit_scale.abs()).exp().sum(1)])

    return stats(products), stats(products.mT) if symmetric else products.new_empty(0), kept


def example_inputs(draw: Draw, B: int = 6, D: int = 4) -> Examples:
    return {
        "plain": {"x": draw(B, D), "y": draw(B, D), "logit_scale": draw.uniform() + 2},
        "labels": {
            "x": draw(B, D),
            "y": draw(B, D),
            "logit_scale": 3.0,
            "labels": draw.whole(3, B),
            "label_smoothing": 0.1,
        },
    }
