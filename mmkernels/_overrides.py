"""What torch asks of public functions and modules for others to see their calls: ``__torch_function__`` and torch.fx.

A function that no door served asks `is_overridden` of its tensors before it looks at them, and lets `overridden_call`
answer: torch.fx then records a call of the function, a tensor subclass or a mode handles it. A module is a leaf of
torch.fx, as those of ``torch.nn`` are: `leaf_of_traces` on its forward.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._pytree import tree_leaves

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


_LISTS = frozenset((list, tuple))


def _spliced(values: Sequence[Any]) -> Sequence[Any]:
    """The values, those in lists one by one, also in lists of lists."""
    if _LISTS.isdisjoint(map(type, values)):
        return values
    flat: list[Any] = []
    for value in values:
        if type(value) in _LISTS:
            flat += value
        else:
            flat.append(value)
    return _spliced(flat)


def is_overridden(*values: Any) -> bool:
    """Whether one of the values, lists of them included, has a ``__torch_function__`` or is a DTensor, or a mode
    listens."""
    if torch.compiler.is_compiling():  # which takes classes with a ``__torch_function__`` apart by itself
        return "torch.distributed.tensor" in sys.modules and is_spread(*tree_leaves(values))
    flat = _spliced(values)
    return has_torch_function(flat) or is_spread(*flat)


def is_spread(*values: Any) -> bool:
    """Whether one is a DTensor, which nobody has before the import."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(x, tensors.DTensor) for x in values)


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


def overridden_call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The result of ``__torch_function__``, or of the sharding rules, for the call with these arguments by name."""
    if torch.compiler.is_compiling():
        return _sharded_call(function, given)
    args, options = [], {}
    for parameter in _parameters(function):
        value = given[parameter.name]
        if parameter.kind is not parameter.KEYWORD_ONLY:
            args.append(value)
        elif value is not parameter.default:
            options[parameter.name] = value
    flat = _spliced((*args, *options.values()))
    if not has_torch_function(flat):
        return _sharded_call(function, given)
    return handle_torch_function(function, flat, *args, **options)


def _sharded_call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    from mmkernels.distributed.sharded_call import sharded_call  # which few programs need

    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return sharded_call(function, {name: given[name] for name in names})


def leaf_of_traces(forward: _Forward) -> _Forward:
    """The forward of a module that torch.fx records as one call, where it is a part of what is traced."""

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if fx._symbolic_trace.is_fx_symbolic_tracing() and getattr(type(self), "forward", None) is call:
            proxy = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, fx.Proxy)), None)
            if proxy is not None and isinstance(proxy.tracer, fx.Tracer) and proxy.tracer.root is not self:
                return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]
