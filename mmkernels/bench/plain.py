"""What several benchmarks say in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_weight(features: int, width: int) -> Tensor:
    """A random weight [features, width] that keeps the variance of what it is multiplied with."""
    return torch.randn(features, width) * width**-0.5


def attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hk, Lk, D], H a multiple of Hk
    value: Tensor,  # [B, Hk, Lk, Dv]
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,  # bool, False where a query may not attend
    softcap: float = 0.0,
) -> Tensor:
    """Attention as models write it: softmax in float32 or wider."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(query.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(query.dtype) @ value


def sum_over_tokens(outs: Sequence[Tensor]) -> Tensor:
    """One tensor [B, H, Dv] of several outputs [B, H, L, Dv], so that all are used, for either side alike."""
    return torch.stack([out.sum(2) for out in outs]).sum(0)


def pooled(x: Tensor, energies: Tensor) -> Tensor:
    """The mean of x [B, M, C] over the modalities, weighed by the softmax of the energies [B, M]."""
    return (energies.softmax(1).unsqueeze(-1) * x).sum(1)


def norm(
    x: Tensor, kind: str | None, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Layer or RMS norm over the last dimension, or none; torch's RMS norm has no bias, which is added."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "rms":
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
    return x if bias is None else x + bias


def with_one(x: Tensor) -> Tensor:
    """x [B, C] with a 1 in front of each row."""
    return torch.cat([torch.ones_like(x[:, :1]), x], -1)
