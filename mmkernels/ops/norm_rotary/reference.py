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
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: queries and keys, and the tables of positions 0 to 15 (Su et al., RoFormer)."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    length, features = 16, 64
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, features, 2) / features)
    query, key = (torch.randn(2, heads, length, features, generator=generator).to(device, dtype) for heads in (4, 2))
    return {"query": query, "key": key, "cos": angle.cos().to(device, dtype), "sin": angle.sin().to(device, dtype)}
