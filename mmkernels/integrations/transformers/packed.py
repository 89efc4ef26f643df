"""Attention over packed images, windows or clips of sound, of Qwen-VL and its kin: all of them by one call.

The classes loop over the members, which windows make hundreds. They are known by their forward's source, which names
nothing but the module's own children and its file's rotary embedding.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED, linear
from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers import NAME
from mmkernels.integrations.transformers.interface import weights_are_captured
from mmkernels.ops.varlen_cross_attention import varlen_cross_attention

__all__ = ["BY_SOURCE"]


def _is_served(module: Any, x: Tensor, kwargs: dict[str, Any]) -> bool:
    wanted = kwargs.get("output_attentions") or weights_are_captured()
    drops = module.training and module.attention_dropout > 0.0
    if wanted or drops or torch.compiler.is_compiling() or x.dim() != 2 or x.dtype not in SERVED:
        return False
    return module.config._attn_implementation == NAME


def _attend(module: Any, projected: tuple[Tensor, ...], cu_seqlens: Tensor, rotation: Any) -> Tensor:
    """Projections (L, H, D) to (L, H·D)."""
    q, k, v = projected
    if rotation is not None:
        q, k = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision(q, k, *rotation)  # type: ignore[attr-defined]
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    starts = cu_seqlens.to(torch.int32)
    return varlen_cross_attention(q, k, v, starts, starts, longest, longest, scale=module.scaling).flatten(1)


def _by_one_product(
    module: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    if not _is_served(module, hidden_states, kwargs):
        return type(module).forward(module, hidden_states, cu_seqlens, position_embeddings, *args, **kwargs)
    projected = linear(module.qkv, hidden_states).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    return linear(module.proj, _attend(module, projected, cu_seqlens, position_embeddings))


def _by_three(
    module: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, list[None]]:
    if not _is_served(module, hidden_states, kwargs):
        return type(module).forward(module, hidden_states, cu_seqlens, position_embeddings, *args, **kwargs)
    children = (module.q_proj, module.k_proj, module.v_proj)
    projected = tuple(linear(child, hidden_states).unflatten(-1, (module.num_heads, -1)) for child in children)
    out = linear(module.out_proj, _attend(module, projected, cu_seqlens, position_embeddings))
    return out, [None] * (len(cu_seqlens) - 1)


def _of_sound(module: Any, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not _is_served(module, hidden_states, kwargs):
        return type(module).forward(module, hidden_states, cu_seqlens, *args, **kwargs)
    children = (module.q_proj, module.k_proj, module.v_proj)
    projected = tuple(linear(child, hidden_states).unflatten(-1, (module.num_heads, -1)) for child in children)
    return linear(module.out_proj, _attend(module, projected, cu_seqlens, None))


BY_SOURCE = {
    source: Swap(function, "varlen_cross_attention", (source,))
    for source, function in (
        ("e1a9e47ecc31", _by_one_product),
        ("67ce86473936", _by_three),
        ("da849eb35b2c", _of_sound),
    )
}
