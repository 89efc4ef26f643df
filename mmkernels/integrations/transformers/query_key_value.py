"""Attentions written by hand over linears called query, key and value: ViLT, FLAVA, LXMERT, VisualBERT and others.

All of them compute softmax(q kᵀ / √D + mask) v with an additive mask and dropout of the weights; they differ in what
they are given and whether an output projection follows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.integrations._blocks import SERVED, dropout_p, linear, masking
from mmkernels.integrations._few_queries import attend_of_children
from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers.weights import weights
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["SWAPS", "attend_to", "heads"]


def heads(x: Tensor, size: int) -> Tensor:
    """(B, L, H·D) as a view (B, H, L, D)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention of projected tokens, (B, L, H·D) → the same."""
    size = module.attention_head_size
    out = cross_attention(heads(q, size), heads(k, size), heads(v, size), dropout_p=p, **masking(mask, q.shape[0]))
    return out.transpose(1, 2).flatten(2)


def attend_to(module: Any, x: Tensor, context: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention of tokens to others, (B, L, ·) → (B, L, H·D)."""
    children = (module.query, module.key, module.value)
    if p == 0.0:
        out = attend_of_children(children, x, context, module.num_attention_heads, masking(mask, x.shape[0]))
        if out is not None:
            return out
    q, k, v = linear(module.query, x), linear(module.key, context), linear(module.value, context)
    return attend(module, q, k, v, mask, p)


def _served(module: Any, x: Tensor, mask: Tensor | None) -> float | None:
    """The probability of dropout of a call that can be served."""
    if x.dtype not in SERVED or x.dim() != 3 or (mask is not None and mask.dim() != 4):
        return None
    return dropout_p(module.dropout)


def _self_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
) -> tuple[Tensor, ...]:
    p = _served(module, hidden_states, attention_mask)
    if output_attentions or p is None:
        return type(module).forward(module, hidden_states, attention_mask, output_attentions)
    q, k, v = (linear(child, hidden_states) for child in (module.query, module.key, module.value))
    return (attend(module, q, k, v, attention_mask, p),)


def _context_attention(
    module: Any,
    hidden_states: Tensor,
    context: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    p = _served(module, hidden_states, attention_mask)
    if output_attentions or p is None:
        return type(module).forward(module, hidden_states, context, attention_mask, output_attentions)
    return (attend_to(module, hidden_states, context, attention_mask, p),)


def _projected_attention(
    module: Any,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor | None, ...]:
    p = _served(module, queries, attention_mask)
    dropped = weights.are("dropped")
    if p is None or (output_attentions and not dropped):
        return type(module).forward(module, queries, keys, values, attention_mask, output_attentions)
    q, k, v = linear(module.query, queries), linear(module.key, keys), linear(module.value, values)
    out = linear(module.out_proj, attend(module, q, k, v, attention_mask, p))
    return (out, None) if output_attentions else (out,)


_SELF, _CONTEXT, _PROJECTED = _self_attention, _context_attention, _projected_attention

SWAPS = {
    f"{name.partition('/')[0]}.modeling_{name.partition('/')[0]}.{name.partition('/')[2]}": Swap(
        function, "cross_attention", (source,)
    )
    for name, function, source in (
        ("vilt/ViltSelfAttention", _SELF, "58cd45fbad59"),
        ("flava/FlavaSelfAttention", _SELF, "5a1e439db90f"),
        ("visual_bert/VisualBertSelfAttention", _SELF, "caa4a71ef235"),
        ("lxmert/LxmertAttention", _CONTEXT, "b996adc41440"),
        ("omdet_turbo/OmDetTurboMultiheadAttention", _PROJECTED, "45d1ed18f712"),
        ("grounding_dino/GroundingDinoMultiheadAttention", _PROJECTED, "0c4cee240c00"),
        ("mm_grounding_dino/MMGroundingDinoMultiheadAttention", _PROJECTED, "cf50304c3cd6"),
    )
}
