"""What the tests of attention's kernels for GPUs share."""

from __future__ import annotations

import torch
from agreement import agree
from fusion_cases import leaf
from torch import Tensor

import mmkernels as mmk


def qkv(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 2,
    key_heads: int = 1,
    queries: int = 70,
    keys: int = 77,
    dim: int = 24,
    value_dim: int = 40,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        leaf(batch, heads, queries, dim, dtype=dtype),
        leaf(batch, key_heads, keys, dim, dtype=dtype),
        leaf(batch, key_heads, keys, value_dim, dtype=dtype),
    )


def check_hidden_values_reach_nobody(dtype: torch.dtype, dim: int = 24) -> None:
    """A key and a value that are not finite reach the queries that may attend to them, and no others."""
    query, key, value = (x.detach() for x in qkv(dtype, key_heads=2, dim=dim, value_dim=dim))
    mask = torch.ones(70, 77, dtype=torch.bool)
    mask[:, 5] = False
    expected = mmk.cross_attention(query, key, value, attn_mask=mask)
    key[:, :, 5], value[:, :, 5] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = mmk.cross_attention(*leaves, attn_mask=mask)
    assert agree([out.detach()], [expected])
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
    mask[3, 5] = True
    rows = mmk.cross_attention(query, key, value, attn_mask=mask).isnan().any(-1)
    assert rows[:, :, 3].all() and rows.sum() == rows[:, :, 3].numel()
