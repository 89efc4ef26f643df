"""norm_rotary in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples


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


def example_inputs(draw: Draw, B: int = 2, H: int = 3, L: int = 4, D: int = 6) -> Examples:
    return {
        "weights": {
            "query": draw(B, H, L, D),
            "key": draw(B, 2, L, D),
            "cos": draw(L, D // 2),
            "sin": draw(L, D // 2),
            "query_weight": draw(D),
            "key_weight": draw(D),
        },
        "neighbours, a table per element": {
            "query": draw(B, H, L, 7),
            "key": draw(B, 2, L, 7),
            "cos": draw(B, L, 2),
            "sin": draw(B, L, 2),
            "key_weight": draw(7),
            "interleaved": True,
        },
        "packed": {"query": draw(L, H, D), "key": draw(L, 2, D), "cos": draw(L, D // 2), "sin": draw(L, D // 2)},
    }
