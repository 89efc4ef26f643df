"""concat_tokens in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
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


def example_inputs(draw: Draw, B: int = 3, L: int = 4, C: int = 6) -> Examples:
    return {
        "all options": {
            "xs": [draw(B, L, C), draw(B, 2, C)],
            "type_embedding": draw(2, C),
            "position_embeddings": [draw(L, C), draw(2, C)],
            "norm": "layer",
            "norm_weight": draw(C),
            "norm_bias": draw(C),
        },
        "no affine": {"xs": [draw(B, L, C), draw(B, 2, C)], "type_embedding": draw(2, C), "norm": "layer"},
        "no norm": {
            "xs": [draw(B, L, C), draw(B, 2, C)],
            "type_embedding": draw(2, C),
            "position_embeddings": [None, draw(2, C)],
        },
    }
