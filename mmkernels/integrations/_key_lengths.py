"""Attention to padded keys: padding is neither projected nor attended to."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.integrations._blocks import takes_products
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.varlen_cross_attention import varlen_cross_attention

__all__ = ["attend_to_kept", "pays"]

_PAYS = 0.95  # of the rows at most: to gather the others takes time too


def pays(x: Tensor, lengths: Tensor, weight: Tensor) -> bool:
    """Whether to project only what is kept of ``x`` (B, L, C) by ``weight`` of keys and values."""
    return takes_products(x, weight) and int(lengths.sum()) <= _PAYS * x.shape[0] * x.shape[1]


def attend_to_kept(q: Tensor, x: Tensor, lengths: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Attention of projected queries (B, N, E) to the beginnings of ``x`` (B, L, C), ``lengths`` (B,) long.

    ``weight`` (2E, C) projects to keys and values. Returns (B, N, E).
    """
    batch, count, _ = q.shape
    rows = (torch.arange(x.shape[1]) < lengths[:, None]).flatten().nonzero().squeeze(1)
    k, v = concat_linear([x.flatten(0, 1)[rows]], weight, bias).unflatten(-1, (2, heads, -1)).unbind(1)  # [ΣL, H, D]
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    of_queries = torch.arange(0, (batch + 1) * count, count, dtype=torch.int32)
    q = q.reshape(batch * count, heads, -1)
    out = varlen_cross_attention(q, k, v, of_queries, starts, count, int(lengths.max()))
    return out.reshape(batch, count, -1)
