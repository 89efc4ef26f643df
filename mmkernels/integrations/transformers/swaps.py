"""Attentions and blocks of transformers that do not ask the attention interface."""

from __future__ import annotations

import inspect

from mmkernels.integrations import _blocks
from mmkernels.integrations._swaps import Swap, source_hash
from mmkernels.integrations.transformers import (
    blip,
    feed_forward,
    grounding_dino,
    layers,
    packed,
    pooled,
    pooling_heads,
    query_key_value,
    vision,
)
from mmkernels.integrations.transformers.rotary import find_rotary

_MODELS = "transformers.models."

SWAPS: dict[str, Swap] = {
    _MODELS + name: swap
    for table in (
        query_key_value.SWAPS,
        grounding_dino.SWAPS,
        blip.SWAPS,
        vision.SWAPS,
        pooled.SWAPS,
        pooling_heads.SWAPS,
    )
    for name, swap in table.items()
}


def find_by_source(kind: type) -> Swap | None:
    """The swap of a class of a model that is known by the source of its forward, or of what that calls."""
    return _by_own_source(kind) or (find_rotary(kind) if kind.__module__.startswith(_MODELS) else None)


def _by_own_source(kind: type) -> Swap | None:
    """Where products are faster here, or images of all sizes are packed."""
    forward = kind.__dict__.get("forward")
    if not kind.__module__.startswith(_MODELS) or not callable(forward):
        return None
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return None
    if "get_max_seqlen" in code.co_names:
        return packed.BY_SOURCE.get(source_hash(forward))
    if code.co_names not in _NAMES or not _blocks.products_pay():  # names are looked at first: they take no time
        return None
    source = source_hash(forward)
    return feed_forward.BY_SOURCE.get(source) or layers.BY_SOURCE.get(source)


_CLAMPS = ("dtype", "torch", "float16", "finfo", "max", "clamp")
_SPEECH = ("dropout", "training", "final_layer_norm", "activation_fn", "fc1", "activation_dropout", "fc2")
_NAMES = {
    ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("self_attn_layer_norm", "self_attn", "nn", "functional", *_SPEECH, *_CLAMPS),
    ("fc1", "activation_fn", "fc2"),
    ("down_proj", "act_fn", "gate_proj", "up_proj"),
    ("dense", "intermediate_act_fn"),
    ("dense", "dropout"),
    ("dense", "dropout", "LayerNorm"),
}
