"""Grounding DINO's fusion of image and text: attention in both directions over one matrix of scores.

The scores' shift by their maximum and the clamp at ±50000 are not seen by softmax: neither is done here.

Pixels are many and tokens of text few, and what is multiplied with a pixel's features x is linear in them. With
q_h = x W_hᵀ + b_h the scores are

    q_h · k_h = x · (k_h W_h) + b_h · k_h

so that the few keys take the projection instead of the many pixels. The same holds for the pixels' values, whose
weighted sums are projected, and for the image's output projection, which the text's values take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED, is_plain_linear, linear
from mmkernels.integrations.transformers.query_key_value import heads
from mmkernels.integrations.transformers.weights import weights
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops.bidirectional_cross_attention import bidirectional_cross_attention

__all__ = ["fusion"]


def fusion(
    module: Any,
    vision_features: Tensor,
    text_features: Tensor,
    vision_attention_mask: Tensor | None = None,
    text_attention_mask: Tensor | None = None,
) -> tuple[tuple[Tensor, None], tuple[Tensor, None]]:
    dropout = module.dropout if module.training else 0.0
    if weights.are("kept") or dropout > 0.0 or vision_features.dtype not in SERVED:
        return type(module).forward(module, vision_features, text_features, vision_attention_mask, text_attention_mask)
    masks = (vision_attention_mask, text_attention_mask)
    way = _on_the_text_s_side if _text_takes_the_projections(module, vision_features, text_features, masks) else _fused
    vision, text = way(module, vision_features, text_features, *masks)
    return (vision, None), (text, None)


def _fused(
    module: Any, vision: Tensor, text: Tensor, vision_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    size = module.head_dim
    of_vision, of_text = bidirectional_cross_attention(
        heads(linear(module.vision_proj, vision), size),
        heads(linear(module.text_proj, text), size),
        heads(linear(module.values_vision_proj, vision), size),
        heads(linear(module.values_text_proj, text), size),
        x_mask=None if vision_mask is None else ~vision_mask,
        y_mask=None if text_mask is None else ~text_mask,
        scale=module.scale,
    )
    of_vision = linear(module.out_vision_proj, of_vision.transpose(1, 2).flatten(2))
    return of_vision, linear(module.out_text_proj, of_text.transpose(1, 2).flatten(2))


_SAVES = 0.6  # of the multiplications at least that share less: what is kept is as fast for each of them, or faster


def _text_takes_the_projections(module: Any, vision: Tensor, text: Tensor, masks: tuple[Tensor | None, ...]) -> bool:
    if vision.device.type != "cpu" or torch.compiler.is_compiling() or autocast_is_on(vision.device):
        return False
    if vision.dtype != text.dtype or vision.dtype == torch.float16 or vision.dim() != 3:
        return False
    projections = (module.vision_proj, module.values_vision_proj, module.out_vision_proj)
    if not all(is_plain_linear(p) and p.bias is not None and p.weight.dtype == vision.dtype for p in projections):
        return False
    pixels, tokens, width = vision.shape[1], text.shape[1], vision.shape[2]
    embed, count = module.embed_dim, module.num_heads
    plain = 3 * pixels * embed * (width + tokens)
    ours = 3 * tokens * (pixels * width * count + embed * width)
    hides_all = any(mask is not None and bool(mask.all(-1).any()) for mask in masks)
    return ours < _SAVES * plain and not hides_all


def _on_the_text_s_side(
    module: Any, vision: Tensor, text: Tensor, vision_mask: Tensor | None, text_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``vision`` (B, L, C), ``text`` (B, N, C); H heads of D."""
    batch, tokens = text.shape[:2]
    split = (module.num_heads, module.head_dim)

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, split).permute(2, 0, 1, 3).flatten(1, 2)  # [H, B·N, D]

    def by_batch(x: Tensor) -> Tensor:
        return x.unflatten(1, (batch, tokens)).transpose(0, 1).flatten(1, 2)  # [H, B·N, C] to [B, H·N, C]

    keys = by_head(linear(module.text_proj, text) * module.scale)
    values = by_head(linear(module.values_text_proj, text))
    queries = module.vision_proj
    shift = by_batch(torch.bmm(keys, queries.bias.view(*split, 1)))  # [B, H·N, 1]
    keys = by_batch(torch.bmm(keys, queries.weight.unflatten(0, split)))
    scores = torch.baddbmm(shift.transpose(1, 2), vision, keys.transpose(1, 2))  # [B, L, H·N]

    to_text = scores.unflatten(-1, (-1, tokens))
    if text_mask is not None:
        to_text = to_text.masked_fill(text_mask[:, None, None, :], -torch.inf)
    out = module.out_vision_proj
    values = by_batch(torch.bmm(values, out.weight.t().unflatten(0, split)))
    of_vision = torch.baddbmm(out.bias, to_text.softmax(-1).flatten(2), values)

    to_vision = scores.transpose(1, 2)
    if vision_mask is not None:
        to_vision = to_vision.masked_fill(vision_mask[:, None, :], -torch.inf)
    mean = torch.bmm(to_vision.softmax(-1), vision)  # [B, H·N, C], of the pixels' features
    mean = mean.unflatten(1, (-1, tokens)).transpose(0, 1).flatten(1, 2)  # [H, B·N, C]
    project = module.values_vision_proj
    of_text = torch.baddbmm(
        project.bias.view(split[0], 1, split[1]), mean, project.weight.unflatten(0, split).transpose(1, 2)
    )
    of_text = of_text.unflatten(1, (batch, tokens)).permute(1, 2, 0, 3).flatten(2)
    return of_vision, linear(module.out_text_proj, of_text)
