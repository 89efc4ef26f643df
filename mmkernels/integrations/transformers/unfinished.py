"""Outputs of encoders that compute what nobody has read yet when somebody does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import _active_collector

from mmkernels.nn._children import _GLOBAL_HOOKS
from mmkernels.ops._checks import autocast_is_on

__all__ = ["Unfinished", "are_watched", "may_wait", "only_tokens"]

_LAST = ("last_hidden_state", "pooler_output")
_WAITING, _POOLED = "_mmkernels_waiting", "_mmkernels_pooled"
only_tokens: ContextVar[bool] = ContextVar("mmkernels_only_tokens", default=False)


class Unfinished(BaseModelOutputWithPooling):
    """The output of an encoder that has stopped before its end; reading more of it goes on."""

    def wait(
        self,
        module: nn.Module,
        layers: list[nn.Module],
        rest: Callable[[], tuple[Tensor, Tensor | None]],
        pooled: Callable[[], Tensor] | None = None,
    ) -> Unfinished:
        """``rest`` gives the last hidden state and the pooled output by ``layers``, ``pooled`` that one alone."""
        modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        moment = (type(module).__name__, layers, _weights(layers), modes)
        self.__dict__[_WAITING] = functools.partial(_resume, moment, rest)
        if pooled is not None:
            self.__dict__[_POOLED] = functools.partial(_resume, moment, pooled)
        return self

    def _go_on(self) -> None:
        waiting = self.__dict__.get(_WAITING)
        if waiting is None:
            return
        last = waiting()
        del self.__dict__[_WAITING]
        self.__dict__.pop(_POOLED, None)
        given = {name: x for name, x in self.__dict__.items() if x is not None}
        found = dict(zip(_LAST, last, strict=True)) | given
        self.clear()
        for name in (*_LAST, "hidden_states", "attentions"):
            setattr(self, name, found.get(name))

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in _LAST and value is None:
            pooled = self.__dict__.get(_POOLED) if name == "pooler_output" else None
            if pooled is not None:
                value = self.__dict__[name] = pooled()
                return value
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
        if only_tokens.get() and _WAITING in self.__dict__ and self.hidden_states is not None:
            return (self.hidden_states,)
        return super().to_tuple()

    def get(self, key: str, default: Any = None) -> Any:
        self._go_on()
        return super().get(key, default)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (*_LAST, "hidden_states", "attentions")
        return BaseModelOutputWithPooling, tuple(getattr(self, name) for name in fields)


Weights = list[tuple[Tensor, int]]


def _resume(moment: tuple[str, list[nn.Module], Weights, tuple[bool, bool]], function: Callable[[], Any]) -> Any:
    """What a function gives in the modes of the call."""
    name, layers, weights, (is_grad_enabled, is_inference) = moment
    found = _weights(layers)
    same = (p is before and version == then for (p, version), (before, then) in zip(found, weights, strict=False))
    if len(found) != len(weights) or not all(same):
        raise RuntimeError(
            f"{name}: last_hidden_state: an accelerated model computes it when it is read; "
            "expected its weights to be those of the call; got others, or ones changed in place since"
        )
    with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad_enabled):
        return function()


def _weights(layers: list[nn.Module]) -> Weights:
    return [(p, -1 if p.is_inference() else p._version) for layer in layers for p in layer.parameters()]


def may_wait(module: Any, x: Tensor | None, options: dict[str, Any]) -> bool:
    """Whether nothing of an encoder's call but what it returns depends on when its layers run."""
    if x is None or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    config = module.config
    returns_dict = options.get("return_dict", getattr(config, "return_dict", True))
    if not returns_dict or options.get("output_attentions", getattr(config, "output_attentions", False)):
        return False
    if _active_collector.get() or autocast_is_on(x.device):
        return False
    return not (
        module.training and config.attention_dropout > 0.0
    )  # whose numbers are drawn in the order of the layers


def are_watched(around: list[nn.Module], waiting: list[nn.Module]) -> bool:
    """Whether anybody but transformers' own collection of outputs would see that modules, or what is in them, run."""
    watched = [*around, *(m for child in waiting for m in child.modules())]
    return any(_GLOBAL_HOOKS) or any(map(_is_watched, watched))


def _is_watched(module: nn.Module) -> bool:
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks.values()
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)
