"""Encoders of which one token is read, CLIP's and SigLIP's: the last layer computes that one, the others wait.

A class token, or a text's end, is all that a contrastive model takes from its encoders. It alone goes through the
attention, as a query, and the feed-forward network of the last layer; what the layer would give for the other tokens
is part of the output still, and computed when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from mmkernels.integrations._blocks import is_plain_linear, linear
from mmkernels.integrations._few_queries import attend_of_children
from mmkernels.integrations._swaps import Swap, SwappedForward, source_hash
from mmkernels.integrations.transformers import NAME
from mmkernels.integrations.transformers.feed_forward import with_residual
from mmkernels.integrations.transformers.unfinished import Unfinished, are_watched, may_wait
from mmkernels.nn._children import is_plain

__all__ = ["ENCODERS", "LATER", "SWAPS", "images"]

ENCODERS = ("c9116e741a89", "2d8a3eb214af")
_LAYERS = ("0b4074bd3af9", "f1043052c9fd", "f8d65bf0ec54")
_ATTENTIONS = ("9a36acda42e1", "dfb27c830146")
LATER = "layers that run when they are read"
_whole: ContextVar[bool] = ContextVar("mmkernels_whole", default=False)


@contextmanager
def _nothing_waits() -> Iterator[None]:
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def _reads_all(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A model that returns all tokens of the encoder inside of it."""
    if torch.compiler.is_compiling():
        return type(module).forward(module, *args, **kwargs)
    with _nothing_waits():
        return type(module).forward(module, *args, **kwargs)


class _Ends(NamedTuple):
    """What follows the last layer: names of the modules that all tokens go through, and the pooled one."""

    of_all: tuple[str, ...]
    of_pooled: tuple[str, ...]


_IMAGES = _Ends((), ("post_layernorm",))
_TEXT = _Ends(("final_layer_norm",), ("final_layer_norm",))
_SIGLIP_S_TEXT = _Ends(("final_layer_norm",), ("final_layer_norm", "head"))


def images(module: Any, pixel_values: Tensor | None, options: dict[str, Any]) -> Unfinished | None:
    """CLIP's encoder of images; None where its last layer cannot wait."""
    if not _waits(module, pixel_values, options, _IMAGES):
        return None
    interpolates = options.get("interpolate_pos_encoding", False)
    x = module.pre_layrnorm(module.embeddings(pixel_values, interpolate_pos_encoding=interpolates))
    return _all_but_the_last(module, x, None, {}, 0, _IMAGES)


def _clip_text(
    module: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not _waits(module, input_ids, kwargs, _TEXT):
        return type(module).forward(module, input_ids, attention_mask, position_ids, **kwargs)
    words = input_ids.view(-1, input_ids.shape[-1])  # type: ignore[union-attr]
    x = module.embeddings(input_ids=words, position_ids=position_ids)
    mask = create_causal_mask(config=module.config, inputs_embeds=x, attention_mask=attention_mask, cache=None)
    words = words.to(torch.int)
    ends = words if module.eos_token_id == 2 else (words == module.eos_token_id).int()
    return _all_but_the_last(module, x, mask, {"is_causal": True}, ends.argmax(-1), _TEXT)


def _siglip_text(
    module: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if not _waits(module, input_ids, kwargs, _SIGLIP_S_TEXT):
        return type(module).forward(module, input_ids, attention_mask, position_ids, **kwargs)
    words = input_ids.view(-1, input_ids.shape[-1])  # type: ignore[union-attr]
    x = module.embeddings(input_ids=words, position_ids=position_ids)
    mask = create_bidirectional_mask(config=module.config, inputs_embeds=x, attention_mask=attention_mask)
    return _all_but_the_last(module, x, mask, {}, -1, _SIGLIP_S_TEXT)


def _waits(module: Any, x: Tensor | None, options: dict[str, Any], ends: _Ends) -> bool:
    if not may_wait(module, x, options) or _whole.get() or x.device.type != "cpu":  # type: ignore[union-attr]
        return False
    config = module.config
    known = {"return_dict", "output_attentions", "output_hidden_states", "interpolate_pos_encoding"}
    if config._attn_implementation != NAME or hasattr(config, "is_causal") or not options.keys() <= known:
        return False
    if options.get("output_hidden_states", getattr(config, "output_hidden_states", False)) not in (False, None):
        return False
    encoder = module.encoder
    if "forward" in encoder.__dict__ or source_hash(type(encoder).forward) not in ENCODERS or not encoder.layers:
        return False
    layer, attn = encoder.layers[-1], encoder.layers[-1].self_attn
    if source_hash(type(layer).forward) not in _LAYERS or source_hash(type(attn).forward) not in _ATTENTIONS:
        return False
    forward = layer.__dict__.get("forward")
    if not (forward is None or isinstance(forward, SwappedForward)) or "forward" in attn.__dict__:
        return False
    if module.training and getattr(layer, "gradient_checkpointing", False):
        return False
    linears = (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj)
    norms = (layer.layer_norm1, layer.layer_norm2)
    if not all(map(is_plain_linear, linears)) or not all(is_plain(norm, nn.LayerNorm) for norm in norms):
        return False
    return not are_watched([module, encoder], [layer, *(getattr(module, name) for name in ends.of_pooled)])


def _all_but_the_last(
    module: Any, x: Tensor, mask: Tensor | None, options: dict[str, Any], at: int | Tensor, ends: _Ends
) -> Unfinished:
    """Run the layers of an encoder but for its last; ``at``: which token is pooled, of all sequences or of each."""
    *layers, last = module.encoder.layers
    for layer in layers:
        x = layer(x, mask, **options)

    def rest() -> tuple[Tensor, Tensor]:
        y = last(x, mask, **options)
        return _through(module, ends.of_all, y), _through(module, ends.of_pooled, _one_of_each(y, at)[:, 0])

    def pooled() -> Tensor:
        token = _one_token(last, x, mask, at)
        return rest()[1] if token is None else _through(module, ends.of_pooled, token[:, 0])

    return Unfinished().wait(module, [last, *(getattr(module, name) for name in ends.of_pooled)], rest, pooled)


def _through(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        x = getattr(module, name)(x)
    return x


def _one_of_each(x: Tensor, at: int | Tensor) -> Tensor:
    """(B, L, C) → (B, 1, C)"""
    if isinstance(at, Tensor):
        return x[torch.arange(x.shape[0], device=x.device), at][:, None]
    at %= x.shape[1]
    return x[:, at : at + 1]


def _one_token(layer: Any, x: Tensor, mask: Tensor | None, at: int | Tensor) -> Tensor | None:
    """What a layer of an encoder gives for one token of each sequence, (B, 1, C)."""
    attn = layer.self_attn
    options = {}
    if mask is not None:
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] != x.shape[0]:
            return None
        options["attn_mask"] = _one_of_each(mask[:, 0], at)[:, None]
    y = layer.layer_norm1(x)
    children = (attn.q_proj, attn.k_proj, attn.v_proj)
    out = attend_of_children(children, _one_of_each(y, at), y, attn.num_heads, options, scale=attn.scale)
    if out is None:
        return None
    out = linear(attn.out_proj, out, residual=_one_of_each(x, at))
    return with_residual(layer.mlp, layer.layer_norm2(out), out)


SWAPS = {
    "clip.modeling_clip.CLIPTextModel": Swap(_clip_text, LATER, ("fae4db03bf1c",)),
    "clip.modeling_clip.CLIPTextModelWithProjection": Swap(_reads_all, LATER, ("85d4a13a86fe",)),
    "clip.modeling_clip.CLIPVisionModelWithProjection": Swap(_reads_all, LATER, ("866ede000957",)),
    "siglip.modeling_siglip.SiglipTextModel": Swap(_siglip_text, LATER, ("7d5a51a2582a",)),
}
