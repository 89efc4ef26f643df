"""Image encoders of LLaVA and its kin, which read the features of an inner layer: the layers after it wait.

`vision_feature_layer` is -2 in most of these models. What the layers after it would give is part of the output still,
and computed when somebody reads it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import resolve_hidden_states_indices, selected_hidden_states

from mmkernels.integrations._blocks import is_hooked
from mmkernels.integrations._swaps import Swap, source_hash
from mmkernels.integrations.transformers import pooled
from mmkernels.integrations.transformers.pooled import ENCODERS, LATER
from mmkernels.integrations.transformers.unfinished import Unfinished, are_watched, may_wait, only_tokens

__all__ = ["SWAPS"]


def _generator(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's forward that makes all of its outputs tuples, nested ones too, to take the first: the tokens."""
    returns_dict = kwargs.get("return_dict", getattr(module.config, "return_dict", True))
    if not returns_dict or torch.compiler.is_compiling() or is_hooked(module.model):
        return type(module).forward(module, *args, **kwargs)
    token = only_tokens.set(True)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        only_tokens.reset(token)


def _clip(module: Any, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    out = None if args else pooled.images(module, pixel_values, kwargs)
    if out is not None:
        return out
    return _encode(module, _ends_of_clip, pixel_values, args, kwargs)


def _siglip(module: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _encode(module, _ends_of_siglip, pixel_values, args, kwargs)


def _ends_of_clip(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return x, module.post_layernorm(x[:, 0, :])


def _ends_of_siglip(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    x = module.post_layernorm(x)
    return x, module.head(x) if module.use_head else None


def _encode(module: Any, ends: Any, pixel_values: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    chosen = _chosen(module, pixel_values, kwargs) if not args else None
    if chosen is None:
        return type(module).forward(module, pixel_values, *args, **kwargs)
    kwargs = {**kwargs}
    kwargs.pop("return_dict", None)
    x = module.embeddings(pixel_values, interpolate_pos_encoding=kwargs.pop("interpolate_pos_encoding", False))
    if ends is _ends_of_clip:
        x = module.pre_layrnorm(x)
    layers = list(module.encoder.layers)
    states: list[Tensor | None] = [None] * (len(layers) + 1)
    mask = kwargs.pop("attention_mask", None)
    for i in range(max(chosen) + 1):
        if i > 0:
            x = layers[i - 1](x, mask, **kwargs)
        if i in chosen:
            states[i] = x
    rest = layers[max(chosen) :]
    out = Unfinished(hidden_states=tuple(states))
    return out.wait(module, rest, functools.partial(_finish, module, ends, rest, x, mask, kwargs))


def _finish(
    module: Any, ends: Any, layers: list[nn.Module], x: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    for layer in layers:
        x = layer(x, mask, **options)
    return ends(module, x)


def _chosen(module: Any, pixel_values: Tensor | None, options: dict[str, Any]) -> set[int] | None:
    """The hidden states that the caller chose by index, if that leaves layers whose outcome can wait."""
    selected = selected_hidden_states(options.get("output_hidden_states"))
    if not selected or not may_wait(module, pixel_values, options):
        return None
    chosen = resolve_hidden_states_indices(module, selected)
    layers = module.encoder.layers
    if not chosen or len(layers) != module.config.num_hidden_layers or max(chosen) >= len(layers):
        return None
    waiting = [*layers[max(chosen) :], module.post_layernorm, *([module.head] if hasattr(module, "head") else [])]
    return None if are_watched([module, module.encoder], waiting) else chosen


def _encoder_is_unknown(module: Any) -> str | None:
    encoder = module.encoder
    found = source_hash(type(encoder).forward)
    if "forward" in encoder.__dict__ or found not in ENCODERS:
        return f"an unknown version of its encoder: hash {found}, known {', '.join(ENCODERS)}"
    return None


SWAPS = {
    "clip.modeling_clip.CLIPVisionModel": Swap(_clip, LATER, ("1a3c94eba1d0",), _encoder_is_unknown),
    "siglip.modeling_siglip.SiglipVisionModel": Swap(_siglip, LATER, ("d37929da1607",), _encoder_is_unknown),
}
for _file, _prefix, _source in (
    ("llava", "Llava", "10199742143d"),
    ("llava_next", "LlavaNext", "7dc59c56f01c"),
    ("video_llava", "VideoLlava", "120e7b772a28"),
    ("llava_next_video", "LlavaNextVideo", "32b477820f09"),
    ("llava_onevision", "LlavaOnevision", "6a9ce00732ee"),
    ("aya_vision", "AyaVision", "b039892bb5af"),
):
    SWAPS[f"{_file}.modeling_{_file}.{_prefix}ForConditionalGeneration"] = Swap(_generator, LATER, (_source,))
