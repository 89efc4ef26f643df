"""concat_tokens in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._norm import normalize


def concat_tokens(
    xs: Sequence[Tensor],  # [B, L_i, C] each
    type_embedding: Tensor | None,  # [M, C]
    position_embeddings: Sequence[Tensor],  # [L_i, C] each, of the sources that have one
    position_sources: Sequence[int],  # whose they are
    norm: str | None,
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:  # [B, Σ L_i, C]
    """norm of x_i + type_embedding[i] + position_embeddings[i], one source after the other."""
    positions = dict(zip(position_sources, position_embeddings, strict=True))
    tokens = []
    for i, x in enumerate(xs):
        token = x if type_embedding is None else x + type_embedding[i]
        tokens.append(token + positions[i] if i in positions else token)
    out = normalize(torch.cat(tokens, 1), norm, norm_weight, norm_bias, eps)
    return out if out_dtype is None else out.to(out_dtype)


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: the tokens of a text and the patches of an image, each kind with its embedding."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {"xs": [random(2, 12, 64), random(2, 49, 64)], "type_embedding": random(2, 64), "norm": "layer"}
