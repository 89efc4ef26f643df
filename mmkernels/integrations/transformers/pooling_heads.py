"""Pooling heads: one learned query attends to all tokens of an image, and no weights are read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations import _few_queries
from mmkernels.integrations._blocks import is_hooked, is_plain_linear, linear
from mmkernels.integrations._swaps import Swap, SwappedForward
from mmkernels.integrations.transformers.feed_forward import with_residual

__all__ = ["SWAPS"]


def _probe(module: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Attention by an nn.MultiheadAttention and a feed-forward network; the mask is True or 1 where a token counts."""
    attention = module.attention
    if not isinstance(attention.__dict__.get("forward"), SwappedForward) or is_hooked(attention):
        masks = () if attention_mask is None else (attention_mask,)
        return type(module).forward(module, hidden_state, *masks)
    padding = None if attention_mask is None else attention_mask == 0
    probe = module.probe.repeat(hidden_state.shape[0], 1, 1)
    x, _ = attention(probe, hidden_state, hidden_state, key_padding_mask=padding, need_weights=False)
    return with_residual(module.mlp, module.layernorm(x), x)[:, 0]


def _class_token(module: Any, hidden_states: Tensor) -> Tensor:
    """AIMv2's: the token itself is the query."""
    projections = (module.k_proj, module.v_proj)
    if not all(map(is_plain_linear, projections)):
        return type(module).forward(module, hidden_states)
    keys, values = (_few_queries.Projection(child.weight, child.bias) for child in projections)
    heads = module.num_heads
    if not _few_queries.pays(1, hidden_states, keys, heads):
        return type(module).forward(module, hidden_states)
    token = module.cls_token.expand(hidden_states.shape[0], -1, -1)
    scale = (module.hidden_size // heads) ** -0.5
    out = _few_queries.attend(token, hidden_states, keys, values, heads, scale, None)
    return linear(module.output_proj, out[:, 0])


SWAPS = {
    name: Swap(function, "cross_attention", (source,))
    for name, function, source in (
        ("siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead", _probe, "69b691fb8fa6"),
        ("idefics2.modeling_idefics2.Idefics2MultiheadAttentionPoolingHead", _probe, "69b691fb8fa6"),
        ("siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead", _probe, "cda32f2dde32"),
        (
            "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionMultiheadAttentionPoolingHead",
            _probe,
            "9e2fde193363",
        ),
        ("aimv2.modeling_aimv2.Aimv2AttentionPoolingHead", _class_token, "56f493a893ca"),
    )
}
