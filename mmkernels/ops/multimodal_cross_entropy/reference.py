"""multimodal_cross_entropy in plain PyTorch: the specification every kernel is tested against.

    CE_i = mean over valid rows of −log p_i[y],   total = Σ w_i CE_i   or   Σ e^(−s_i) CE_i + s_i

Runs on every device and dtype, differentiable any number of times. Everything but the logits is float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear

REVERSE = 4.0  # −A of the symmetric loss: minus the logarithm that stands for log 0


def row_losses(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    valid: Tensor | None,  # [B] bool
    modulation: Tensor | None,  # [] scale of the gradient of the logits
    label_smoothing: float,
    robust: str | None,
    q: float,
) -> Tensor:
    """The loss of every row, [B], 0 where a row is not valid, whatever it holds."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if valid is not None:
        z = z.masked_fill(~valid.unsqueeze(1), 0)
        labels = labels.masked_fill(~valid, 0)
    if z.shape[1] == 0:  # without classes no row is valid
        return z.sum(1)
    impossible = z == -torch.inf
    if modulation is not None:
        kept = z.detach()
        z = kept + modulation.detach().to(z.dtype) * (z - kept)
    z = z.masked_fill(impossible, -torch.inf)  # no gradient
    top = z.detach().amax(1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    total = torch.exp(z - top).sum(1, keepdim=True)
    log_p = z - top - total.masked_fill(total == 0, 1).log()
    of_label = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    if robust == "gce":
        losses = -torch.expm1(q * of_label) / q
    elif robust == "symmetric":
        losses = -of_label - REVERSE * torch.expm1(of_label)
    elif label_smoothing > 0:
        losses = -(1 - label_smoothing) * of_label - label_smoothing * log_p.mean(1)
    else:
        losses = -of_label
    return losses if valid is None else losses.masked_fill(~valid, 0)


def mean_loss(losses: Tensor, count: Tensor) -> Tensor:
    """Over the valid rows; 0 where there is none."""
    return losses.sum() / count.clamp(min=1)


def combined(
    losses: Sequence[Tensor], counts: Sequence[Tensor], weights: Tensor | None, log_vars: Tensor | None
) -> Any:
    """The total and the losses of the modalities, [M]. One without valid rows contributes nothing, its s_i neither."""
    means = torch.stack(list(losses))
    if log_vars is not None:
        s = log_vars.to(means.dtype)
        terms = torch.exp(-s) * means + s
    else:
        terms = means if weights is None else weights.to(means.dtype) * means
    empty = torch.stack(list(counts)) == 0
    return terms.masked_fill(empty, 0).sum(), means


def valid_rows(labels: Tensor, ignore_index: int, presence: Tensor | None, modality: int) -> Tensor:
    """Rows [B] whose label counts and where the modality is present."""
    valid = labels != ignore_index
    return valid if presence is None else valid & presence[..., modality]


def multimodal_cross_entropy(
    logits: Sequence[Tensor],  # M of [B, C_i]
    labels: Sequence[Tensor],  # one of [B], or M
    weights: Tensor | None,  # [M]
    log_vars: Tensor | None,  # [M]
    presence: Tensor | None,  # [M] or [B, M] bool
    modulation: Tensor | None,  # [M]
    label_smoothing: float,
    ignore_index: int,
    robust: str | None,
    q: float,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """The total [] and the loss of every modality [M], in the logits' dtype or, ``wide``, in float32 at least."""
    losses, counts = [], []
    for i, z in enumerate(logits):
        y = labels[i if len(labels) > 1 else 0]
        valid = valid_rows(y, ignore_index, presence, i)
        scale = None if modulation is None else modulation[i]
        counts.append(valid.sum())
        losses.append(mean_loss(row_losses(z, y, valid, scale, label_smoothing, robust, q), counts[-1]))
    total, means = combined(losses, counts, weights, log_vars)
    return (total, means) if wide else (total.to(logits[0].dtype), means.to(logits[0].dtype))


def saved_statistics(
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    weights: Tensor | None,
    log_vars: Tensor | None,
    presence: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Maximum and Σ exp(z − it) of every row, [M, B, 2], and the means [M], float32 or float64."""
    *of_loss, _ = options
    _, means = multimodal_cross_entropy(logits, labels, weights, log_vars, presence, *of_loss, True)  # type: ignore[call-arg]
    statistics = []
    for z in logits:
        z = z.to(means.dtype)
        top = z.amax(1).clamp_min(torch.finfo(z.dtype).min) if z.shape[1] else z.new_zeros(z.shape[0])
        statistics.append(torch.stack([top, (z - top.unsqueeze(1)).exp().sum(1)], 1))
    return torch.stack(statistics), means


def linear_cross_entropy(
    hidden: Tensor,  # [B, D]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    labels: Tensor,  # [B]
    valid: Tensor,  # [B] bool
    modulation: Tensor | None,  # []
    label_smoothing: float,
    robust: str | None,
    q: float,
    *_: Any,
) -> Tensor:
    """The mean loss [] of the logits that a head makes of hidden states."""
    hidden = hidden.masked_fill(~valid.unsqueeze(1), 0)
    logits = linear(hidden, weight)
    if bias is not None:
        logits = logits + bias
    return mean_loss(row_losses(logits, labels, valid, modulation, label_smoothing, robust, q), valid.sum())


SCALED_GRADIENTS = ("modulation",)  # of these examples, by design: they are no derivatives


def example_inputs(draw: Draw, B: int = 5, C: int = 6) -> Examples:
    return {
        "weights": {
            "logits": [draw(B, C), draw(B, 3)],
            "labels": draw.whole(3, B),
            "weights": draw(2),
            "presence": draw.flags(B, 2),
        },
        "modulation": {
            "logits": [draw(B, C), draw(B, 3)],
            "labels": draw.whole(3, B),
            "weights": draw(2),
            "modulation": draw(2),
        },
        "uncertainty": {
            "logits": [draw(B, C), draw(B, 3)],
            "labels": [draw.whole(C, B), draw.whole(3, B)],
            "log_vars": draw(2),
            "label_smoothing": 0.1,
            "ignore_index": 1,
        },
        "symmetric": {"logits": [draw(B, C), draw(B, 3)], "labels": draw.whole(3, B), "robust": "symmetric"},
        "hidden states": {
            "logits": [draw(B, 4), draw(B, 4)],
            "labels": draw.whole(C, B),
            "linear": [(draw(C, 4), draw(C)), (draw(C, 4), None)],
            "robust": "gce",
            "presence": draw.flags(B, 2),
        },
    }
