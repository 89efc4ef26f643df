"""Attention of few queries to many tokens: the queries take the projections of keys and values.

Keys and values are linear in the tokens x. With k_h = x W_hᵀ + b_h the scores of a head are

    q_h · k_h = x · (q_h W_h) + q_h · b_h

and a mean of values is the projection of a mean of tokens. Where a token would be projected to hundreds of features for
a handful of queries, as in a pooling head with its one probe, this takes a fraction of the multiplications.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.integrations._blocks import is_large, is_plain_linear, linear
from mmkernels.ops._checks import autocast_is_on

__all__ = ["Projection", "attend", "attend_of_children", "pays"]

_PAYS = 0.65  # of the multiplications at most: measured on one core, float32 and bfloat16, 1.2 times faster there


class Projection(NamedTuple):
    """Of tokens to keys or values: weight (E, C) and bias (E,)."""

    weight: Tensor
    bias: Tensor | None


def pays(queries: int, x: Tensor, keys: Projection, heads: int) -> bool:
    """Whether queries had better take the projections of ``x`` (B, L, C)."""
    if not is_large(x, keys.weight) or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or autocast_is_on(x.device):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or x.dtype != keys.weight.dtype:
        return False
    (embed, width), tokens = keys.weight.shape, x.shape[1]
    plain = tokens * embed * (width + queries)
    ours = queries * (heads * tokens * width + embed * width)
    return ours < _PAYS * plain


def attend_of_children(
    children: tuple[nn.Module, nn.Module, nn.Module],
    queries: Tensor,
    x: Tensor,
    heads: int,
    options: dict[str, Any],
    *,
    scale: float | None = None,
) -> Tensor | None:
    """Attention of ``queries`` (B, N, ·) to ``x`` (B, L, C) by linears for queries, keys and values.

    None where it had better be done otherwise. ``options`` are cross_attention's, as `masking` gives them.
    """
    query, key, value = children
    if queries.dim() != 3 or x.dim() != 3 or queries.dtype != x.dtype:
        return None
    if not (is_plain_linear(key) and is_plain_linear(value)):
        return None
    keys, values = Projection(key.weight, key.bias), Projection(value.weight, value.bias)  # type: ignore[arg-type]
    if values.weight.shape != keys.weight.shape or not pays(queries.shape[1], x, keys, heads):
        return None
    is_said, keep = _kept(options, x)
    if not is_said:
        return None
    scale = (keys.weight.shape[0] // heads) ** -0.5 if scale is None else scale
    return attend(linear(query, queries), x, keys, values, heads, scale, keep)


def _kept(options: dict[str, Any], x: Tensor) -> tuple[bool, Tensor | None]:
    """Whether a mask (B, N | 1, L) says what ``options`` do, and leaves each query a token; the mask."""
    if not options:
        return True, None
    if options.keys() == {"key_lengths"}:  # of which none is 0
        return True, (torch.arange(x.shape[1]) < options["key_lengths"][:, None])[:, None]
    mask = options.get("attn_mask")
    if len(options) > 1 or mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return False, None
    return bool(mask.any(-1).all()), mask[:, 0]


def attend(
    q: Tensor, x: Tensor, keys: Projection, values: Projection, heads: int, scale: float, keep: Tensor | None
) -> Tensor:
    """softmax(scale · q kᵀ) v of projected queries (B, N, E) and tokens ``x`` (B, L, C): (B, N, E).

    ``keep`` (B, N | 1, L): which tokens a query attends to, True, at least one of them.
    """
    batch, count = q.shape[:2]

    def by_head(y: Tensor) -> Tensor:
        return y.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)  # [H, B·N, D]

    def by_batch(y: Tensor) -> Tensor:
        return y.unflatten(1, (batch, count)).transpose(0, 1).flatten(1, 2)  # [H, B·N, ·] to [B, H·N, ·]

    q = by_head(q * scale)
    folded = by_batch(torch.bmm(q, keys.weight.unflatten(0, (heads, -1))))  # [B, H·N, C]
    scores = torch.bmm(folded, x.transpose(1, 2))
    if keys.bias is not None:  # which softmax does not see; its gradient is zero, and not absent
        scores = scores + by_batch(torch.bmm(q, keys.bias.view(heads, -1, 1)))
    if keep is not None:
        scores = scores.unflatten(1, (heads, count)).masked_fill(~keep[:, None], -torch.inf).flatten(1, 2)
    mean = torch.bmm(scores.softmax(-1), x)  # [B, H·N, C]
    mean = mean.unflatten(1, (heads, count)).transpose(0, 1).flatten(1, 2)  # [H, B·N, C]
    out = torch.bmm(mean, values.weight.unflatten(0, (heads, -1)).transpose(1, 2))  # [H, B·N, D]
    out = out.unflatten(1, (batch, count)).permute(1, 2, 0, 3).flatten(2)
    return out if values.bias is None else out + values.bias
