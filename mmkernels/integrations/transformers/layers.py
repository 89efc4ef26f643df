"""Layers of encoders and decoders that many of transformers' classes share: the last residual joins a product.

As the feed-forward networks in them they are known by their forward's source alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers.feed_forward import feed_forward, with_residual

__all__ = ["BY_SOURCE"]


def _checkpoints(module: Any) -> bool:
    """Whether the class's forward, which is wrapped for that, would compute this call again in the backward."""
    return module.gradient_checkpointing and module.training and torch.is_grad_enabled()


def _vision_layer(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if len(args) > 1 or _checkpoints(module):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    if args:
        kwargs["attention_mask"] = args[0]
    attended, _ = module.self_attn(hidden_states=module.layer_norm1(hidden_states), **kwargs)
    x = hidden_states + attended
    return with_residual(module.mlp, module.layer_norm2(x), x)


def _language_layer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    options = {
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "cache": cache,
        "use_cache": use_cache,
        "position_embeddings": position_embeddings,
        **kwargs,
    }
    if _checkpoints(module) or "past_key_values" in kwargs:  # which the class's forward takes for the cache
        return type(module).forward(module, hidden_states, **options)
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **options)
    x = hidden_states + attended
    return with_residual(module.mlp, module.post_attention_layernorm(x), x)


def _speech_layer(module: Any, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    if _checkpoints(module) or hidden_states.dtype == torch.float16:  # whose infinities are clamped in the end
        return type(module).forward(module, hidden_states, attention_mask, **kwargs)
    normed = module.self_attn_layer_norm(hidden_states)
    attended, _ = module.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
    x = hidden_states + torch.nn.functional.dropout(attended, p=module.dropout, training=module.training)
    return feed_forward(module, x, module.final_layer_norm(x))


BY_SOURCE: dict[str, Swap] = {
    source: Swap(function, "concat_linear", sources)
    for function, sources in (
        (_vision_layer, ("0b4074bd3af9", "f1043052c9fd", "f8d65bf0ec54")),
        (_language_layer, ("a6a4bcb48f63",)),
        (_speech_layer, ("4f85176b9b70",)),
    )
    for source in sources
}
