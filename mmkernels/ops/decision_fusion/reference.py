"""decision_fusion in plain PyTorch: the specification every kernel is tested against.

    p_i = softmax(logits_i);   mean: Σ w_i p_i;   log: softmax(Σ w_i log p_i);   product: softmax(Σ log p_i)
    max: max_i p_i, normalised;   vote: Σ w_i [c = argmax p_i] / Σ w_i

Runs on every device and dtype, in float32 or wider, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples


def shares_of_present(weights: Tensor | None, there: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, M]: 0 for what is not there. In a row that lacks a modality the others' weights are divided by their sum."""
    if weights is None:
        counted = there.to(dtype)
        return counted / counted.sum(-1, keepdim=True).clamp_min(1)
    weights = weights.to(dtype)
    kept = weights.expand(there.shape).masked_fill(~there, 0)
    total = kept.sum(-1, keepdim=True)
    return kept / total.masked_fill(there.all(-1, keepdim=True) | (total == 0), 1)


def decision_fusion(
    logits: Sequence[Tensor],  # M of [B, C]
    weights: Tensor | None,  # [M] or [B, M]
    method: str,
    presence: Tensor | None,  # [B, M] or [M] bool
) -> Tensor:
    """Probabilities [B, C]; zeros where every modality is absent."""
    dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    z = torch.stack(list(logits), 1).to(dtype)  # [B, M, C]
    there = (z != -torch.inf).any(-1)  # logits that exclude every class count as absent
    if presence is not None:
        there = there & presence
    z = z.masked_fill(~there[..., None], 0)
    log_p = torch.log_softmax(z, -1)
    shares = shares_of_present(weights, there, dtype)
    if method == "mean":
        fused = (shares[..., None] * log_p.exp()).sum(1)
    elif method == "max":
        most = log_p.exp().masked_fill(~there[..., None], 0).amax(1)
        total = most.sum(-1, keepdim=True)
        fused = most / total.masked_fill(total == 0, 1)
    elif method == "vote":
        votes = F.one_hot(z.argmax(-1), z.shape[-1]) if z.shape[-1] > 0 else z
        total = shares.sum(-1, keepdim=True)
        fused = (shares[..., None] * votes).sum(1) / total.masked_fill(total == 0, 1)
    else:
        factors = (shares if method == "log" else there.to(dtype))[..., None]
        impossible = log_p == -torch.inf
        energies = (factors * log_p.masked_fill(impossible, 0)).sum(1)
        excluded = (impossible & (factors != 0)).any(1)
        none_left = excluded.all(-1, keepdim=True) | ~there.any(-1, keepdim=True)
        energies = energies.masked_fill(excluded & ~none_left, -torch.inf)
        fused = torch.softmax(energies, -1).masked_fill(none_left, 0)
    return fused.to(logits[0].dtype)


def example_inputs(draw: Draw, B: int = 5, C: int = 6) -> Examples:
    return {
        "log": {
            "logits": [draw(B, C), draw(B, C)],
            "weights": draw.uniform(2),
            "method": "log",
            "presence": draw.flags(B, 2),
        },
        "the mean": {"logits": [draw(B, C), draw(B, C)], "weights": draw.uniform(B, 2)},
        "the maximum": {"logits": [draw(B, C), draw(B, C)], "method": "max"},
    }
