"""Attentions that rotate queries and keys by `apply_rotary_pos_emb`, as LLaMA's and some hundred others do.

Their forwards differ, the function comes in a few versions. A swapped forward is the class's own code with ours under
that name, in a copy of its globals: the module's are left as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED
from mmkernels.integrations._rotary_tables import first_half, kept
from mmkernels.integrations._swaps import Swap, source_hash
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops.norm_rotary import norm_rotary

__all__ = ["find_rotary"]

Function = Callable[..., Any]


def _heads(plain: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """Of queries (B, H, L, D), with tables (B, L, D)."""
    fits = unsqueeze_dim == 1 and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
    table = _table(q, k, cos, sin) if fits and q.dtype == cos.dtype else None  # of others the product is promoted
    return plain(q, k, cos, sin, unsqueeze_dim) if table is None else norm_rotary(q, k, *table)


def _parts_of_heads(plain: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """The same with tables (B, L, R), R ≤ D."""
    fits = unsqueeze_dim == 1 and q.dim() == 4 and cos.dim() == 3 and cos.shape[-1] <= q.shape[-1]
    table = _table(q, k, cos, sin) if fits and q.dtype == cos.dtype else None
    return plain(q, k, cos, sin, unsqueeze_dim) if table is None else norm_rotary(q, k, *table)


def _packed_heads(plain: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """Of an image's queries (L, H, D), with tables (L, D); the original computes in float32 and rounds once."""
    table = _table(q, k, cos, sin) if q.dim() == 3 and cos.dim() == 2 and cos.shape[-1] == q.shape[-1] else None
    return plain(q, k, cos, sin) if table is None else norm_rotary(q, k, *table)


def _table(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin of half the features; None where these are no such tables, or the op is not for the call."""
    if (
        q.dtype not in SERVED
        or k.dtype != q.dtype
        or cos.dtype != sin.dtype
        or cos.dtype not in (q.dtype, torch.float32)
    ):
        return None
    if q.device.type != "cpu" or cos.requires_grad or sin.requires_grad or autocast_is_on(q.device):
        return None
    if type(cos) is not Tensor or type(sin) is not Tensor or cos.shape != sin.shape or cos.shape[-1] % 2:
        return None
    half_cos, half_sin = kept(cos, first_half), kept(sin, first_half)
    return None if half_cos is None or half_sin is None else (half_cos, half_sin)


# What stands under a name in known versions, by the hash of its source; all call `rotate_half`.
_KNOWN: dict[str, dict[str, Function]] = {
    "apply_rotary_pos_emb": {
        **dict.fromkeys(("a6dd2967da96", "dcce26b5d767", "0ea8a470c495", "97ef4fe3f6b2"), _heads),
        **dict.fromkeys(("af678e6a3ed9", "bff3d3addba6"), _heads),  # which cast the result to the dtype of queries
        **dict.fromkeys(("1883fd41ad0d", "358cf3e549ac", "2a195d801e5e"), _parts_of_heads),
    },
    "apply_rotary_pos_emb_vision": {"e174399e546c": _packed_heads},
}
_ROTATE_HALF = "c3e95bb5f330"  # (−second half, first half)
_DEPRECATION = "transformers.utils.deprecation"  # whose decorators rename an argument


def find_rotary(kind: type) -> Swap | None:
    """The swap of an attention whose forward calls a known function; None of others."""
    forward = kind.__dict__.get("forward")
    if not callable(forward) or _with_ours(forward) is None:
        return None
    return Swap(_forward, "norm_rotary", (source_hash(forward),))


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if torch.compiler.is_compiling():
        return forward(module, *args, **kwargs)
    found = _with_ours(forward)
    if found is None or not found.serves(kwargs):
        return forward(module, *args, **kwargs)
    return found.function(module, *args, **kwargs)


class _Found:
    """A forward with ours in the place of its module's functions."""

    def __init__(self, inner: Any, replaced: dict[str, Function], renamed: set[str]) -> None:
        self._globals = inner.__globals__
        self._originals = {name: self._globals[name] for name in replaced}
        self._renamed = renamed
        ours = {name: functools.partial(function, self._originals[name]) for name, function in replaced.items()}
        parts = (inner.__name__, inner.__defaults__, inner.__closure__)
        self.function = types.FunctionType(inner.__code__, {**self._globals, **ours}, *parts)
        self.function.__kwdefaults__ = inner.__kwdefaults__

    def serves(self, kwargs: dict[str, Any]) -> bool:
        """Whether nobody has put another function into the module since, and no argument has a name of the past."""
        unchanged = all(self._globals.get(name) is original for name, original in self._originals.items())
        return unchanged and self._renamed.isdisjoint(kwargs)


@functools.cache
def _with_ours(forward: Any) -> _Found | None:
    renamed: set[str] = set()
    inner = forward
    while hasattr(inner, "__wrapped__"):
        if inner.__globals__.get("__name__") != _DEPRECATION:
            return None
        cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
        renamed.add(cells["old_name"].cell_contents)
        inner = inner.__wrapped__
    if not isinstance(inner, types.FunctionType):
        return None
    replaced: dict[str, Function] = {}
    for name in set(_KNOWN).intersection(inner.__code__.co_names):
        ours = _KNOWN[name].get(_hash_of(inner, name))
        if ours is None or _hash_of(inner, "rotate_half") != _ROTATE_HALF:
            return None
        replaced[name] = ours
    return _Found(inner, replaced, renamed) if replaced else None


def _hash_of(inner: types.FunctionType, name: str) -> str:
    """Of the function under a name in the module of another."""
    found = inner.__globals__.get(name)
    return source_hash(found) if callable(found) else "no function"
