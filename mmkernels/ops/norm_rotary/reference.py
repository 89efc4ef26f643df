"""norm_rotary in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rotary(
    query: Tensor,  # [B, H, L, D], or packed [L, H, D]
    key: Tensor,  # [B, Hk, L, D], or packed [L, Hk, D]
    cos: Tensor,  # [L, R/2] or [B or 1, L, R/2]
    sin: Tensor,
    query_weight: Tensor | None,  # [D]
    key_weight: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Each head's RMSNorm where there is a weight, then its rotation; in float32 at least, and rounded once."""
    if cos.dim() == 3 or query.dim() == 3:  # the same for all heads
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def of(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
        return rotate(wide, cos, sin, interleaved).to(x.dtype)

    return of(query, query_weight), of(key, key_weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first R features of x by pairs, the others as they are; cos and sin [.., R/2] broadcast."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = [first * cos - second * sin, second * cos + first * sin]
    out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([out, rest], -1)


def example_inputs(
    batch: int = 2, heads: int = 4, key_heads: int = 2, length: int = 16, features: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries and keys, and the tables of positions 0 … length - 1 (Su et al., RoFormer)."""
    frequency = 10000.0 ** (-torch.arange(0, features, 2) / features)
    angle = torch.arange(length)[:, None] * frequency
    query, key = (torch.randn(batch, n, length, features) for n in (heads, key_heads))
    return query, key, angle.cos(), angle.sin()
