"""Image encoders of LLaVA and its kin, which read the features of an inner layer: the layers after it wait.

`vision_feature_layer` is -2 in most of these models. What the layers after it would give is part of the output still,
and computed when somebody reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import (
    _active_collector,
    resolve_hidden_states_indices,
    selected_hidden_states,
)

from mmkernels.integrations._blocks import is_hooked
from mmkernels.integrations._swaps import Swap, source_hash
from mmkernels.nn._children import _GLOBAL_HOOKS
from mmkernels.ops._checks import autocast_is_on

__all__ = ["SWAPS"]

_LAST = ("last_hidden_state", "pooler_output")
_WAITING = "_mmkernels_waiting"
_only_tokens: ContextVar[bool] = ContextVar("mmkernels_only_tokens", default=False)


class Unfinished(BaseModelOutputWithPooling):
    """The output of an encoder that has stopped at the last layer that was asked for; reading more of it goes on."""

    def _go_on(self) -> None:
        waiting = self.__dict__.get(_WAITING)
        if waiting is None:
            return
        last = waiting()
        del self.__dict__[_WAITING]
        given = {name: x for name, x in self.__dict__.items() if x is not None}
        found = dict(zip(_LAST, last, strict=True)) | given
        self.clear()
        for name in (*_LAST, "hidden_states", "attentions"):
            setattr(self, name, found.get(name))

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _LAST and value is None:
            self._go_on()
            return super().__getattribute__(name)
        return value

    def __getitem__(self, key: Any) -> Any:
        self._go_on()
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._go_on()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._go_on()
        return super().__iter__()

    def __len__(self) -> int:
        self._go_on()
        return super().__len__()

    def __eq__(self, other: object) -> bool:
        self._go_on()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self._go_on()
        return super().__repr__()

    def keys(self) -> Any:
        self._go_on()
        return super().keys()

    def values(self) -> Any:
        self._go_on()
        return super().values()

    def items(self) -> Any:
        self._go_on()
        return super().items()

    def to_tuple(self) -> tuple[Any, ...]:
        if _only_tokens.get() and _WAITING in self.__dict__:
            return (self.hidden_states,)
        return super().to_tuple()

    def get(self, key: str, default: Any = None) -> Any:
        self._go_on()
        return super().get(key, default)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (*_LAST, "hidden_states", "attentions")
        return BaseModelOutputWithPooling, tuple(getattr(self, name) for name in fields)


def _generator(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's forward that makes all of its outputs tuples, nested ones too, to take the first: the tokens."""
    returns_dict = kwargs.get("return_dict", getattr(module.config, "return_dict", True))
    if not returns_dict or torch.compiler.is_compiling() or is_hooked(module.model):
        return type(module).forward(module, *args, **kwargs)
    token = _only_tokens.set(True)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        _only_tokens.reset(token)


def _clip(module: Any, pixel_values: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
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
    out = Unfinished(hidden_states=tuple(states))
    rest = layers[max(chosen) :]
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    out.__dict__[_WAITING] = functools.partial(_finish, module, ends, rest, x, mask, kwargs, modes, _versions(rest))
    return out


def _finish(
    module: Any,
    ends: Any,
    layers: list[nn.Module],
    x: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    modes: tuple[bool, bool],
    versions: list[int],
) -> tuple[Tensor, Tensor | None]:
    if _versions(layers) != versions:
        raise RuntimeError(
            f"{type(module).__name__}: last_hidden_state: an accelerated model computes it when it is read; "
            "expected its weights to be those of the call; got ones changed in place since"
        )
    is_grad_enabled, is_inference = modes
    with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad_enabled):
        for layer in layers:
            x = layer(x, mask, **options)
        return ends(module, x)


def _versions(layers: list[nn.Module]) -> list[int]:
    return [p._version for layer in layers for p in layer.parameters() if not p.is_inference()]


def _chosen(module: Any, pixel_values: Tensor | None, options: dict[str, Any]) -> set[int] | None:
    """The hidden states that the caller chose by index, if that leaves layers whose outcome can wait."""
    selected = selected_hidden_states(options.get("output_hidden_states"))
    if not selected or pixel_values is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    config = module.config
    returns_dict = options.get("return_dict", getattr(config, "return_dict", True))
    if not returns_dict or options.get("output_attentions", getattr(config, "output_attentions", False)):
        return None
    if _active_collector.get() or autocast_is_on(pixel_values.device):
        return None
    if module.training and config.attention_dropout > 0.0:  # whose numbers are drawn in the order of the layers
        return None
    chosen = resolve_hidden_states_indices(module, selected)
    layers = module.encoder.layers
    if not chosen or len(layers) != config.num_hidden_layers or max(chosen) >= len(layers):
        return None
    waiting = [*layers[max(chosen) :], module.post_layernorm, *([module.head] if hasattr(module, "head") else [])]
    watched = [module, module.encoder, *(m for child in waiting for m in child.modules())]
    return None if any(_GLOBAL_HOOKS) or any(map(_is_watched, watched)) else chosen


def _is_watched(module: nn.Module) -> bool:
    """Whether anybody but transformers' own collection of outputs would see that a module is run."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


def _encoder_is_unknown(module: Any) -> str | None:
    encoder = module.encoder
    found = source_hash(type(encoder).forward)
    if "forward" in encoder.__dict__ or found not in _ENCODERS:
        return f"an unknown version of its encoder: hash {found}, known {', '.join(_ENCODERS)}"
    return None


_ENCODERS = ("c9116e741a89", "2d8a3eb214af")
_WITH = "layers that run when they are read"
SWAPS = {
    "clip.modeling_clip.CLIPVisionModel": Swap(_clip, _WITH, ("1a3c94eba1d0",), _encoder_is_unknown),
    "siglip.modeling_siglip.SiglipVisionModel": Swap(_siglip, _WITH, ("d37929da1607",), _encoder_is_unknown),
}
for _file, _prefix, _source in (
    ("llava", "Llava", "10199742143d"),
    ("llava_next", "LlavaNext", "7dc59c56f01c"),
    ("video_llava", "VideoLlava", "120e7b772a28"),
    ("llava_next_video", "LlavaNextVideo", "32b477820f09"),
    ("llava_onevision", "LlavaOnevision", "6a9ce00732ee"),
    ("aya_vision", "AyaVision", "b039892bb5af"),
):
    SWAPS[f"{_file}.modeling_{_file}.{_prefix}ForConditionalGeneration"] = Swap(_generator, _WITH, (_source,))
