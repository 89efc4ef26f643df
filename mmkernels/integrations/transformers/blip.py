"""BLIP: attention of its image encoder, and of its text encoder and decoder to themselves and to the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations._blocks import SERVED, dropout_p, linear
from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers.interface import weights_are_captured
from mmkernels.integrations.transformers.query_key_value import attend_to
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["SWAPS"]


def _vision_attention(module: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    p = dropout_p(module.dropout)
    wanted = kwargs.get("output_attentions") or weights_are_captured()
    if p is None or wanted or hidden_states.dtype not in SERVED:
        return type(module).forward(module, hidden_states, **kwargs)
    mixed = linear(module.qkv, hidden_states).unflatten(-1, (3, module.num_heads, -1))
    q, k, v = mixed.permute(2, 0, 3, 1, 4)  # 3 x [B, H, L, D]
    out = cross_attention(q, k, v, scale=module.scale, dropout_p=p)
    return linear(module.projection, out.transpose(1, 2).flatten(2)), None


def _text_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    p = dropout_p(module.dropout)
    wanted = kwargs.get("output_attentions") or weights_are_captured()
    if cache is not None or p is None or wanted or hidden_states.dtype not in SERVED:
        return type(module).forward(
            module, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, cache, **kwargs
        )
    context, mask = hidden_states, attention_mask
    if encoder_hidden_states is not None:
        context, mask = encoder_hidden_states, encoder_attention_mask
    return attend_to(module, hidden_states, context, mask, p), None


SWAPS = {
    "blip.modeling_blip.BlipAttention": Swap(_vision_attention, "cross_attention", ("840e67a05ce2",)),
    "blip.modeling_blip_text.BlipTextSelfAttention": Swap(_text_attention, "cross_attention", ("3597fceb6a5e",)),
}
