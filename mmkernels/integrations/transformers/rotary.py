"""Attentions that rotate queries and keys by `apply_rotary_pos_emb`, as LLaMA's and some hundred others do.

Their forwards differ, the function comes in a few versions. A swapped forward is the class's own code with ours under
that name, in a copy of its globals: the module's are left as they are.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED
from mmkernels.integrations._rotary_tables import first_half, kept
from mmkernels.integrations._swaps import Swap, source_hash
from mmkernels.nn._children import is_plain
from mmkernels.ops._checks import autocast_is_on
from mmkernels.ops.norm_rotary import norm_rotary

__all__ = ["find_rotary", "packed_heads"]

Function = Callable[..., Any]


def _heads(
    plain: Function,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
    *,
    in_part: bool = False,
    casts: bool = False,
) -> Any:
    """Of queries (B, H, L, D), with tables (B, L, D), or (B, L, R) where the original rotates ``in_part``.

    The result of one that ``casts`` has the dtype of queries; of others the wider of both, which the op has not.
    """
    fits = unsqueeze_dim == 1 and q.dim() == 4 and cos.dim() == 3 and (casts or q.dtype == cos.dtype)
    if fits and (cos.shape[-1] == q.shape[-1] or (in_part and cos.shape[-1] < q.shape[-1])):
        table = _table(q, k, cos, sin)
        if table is not None:
            return norm_rotary(q, k, *table)
    return plain(q, k, cos, sin, unsqueeze_dim)


def packed_heads(plain: Function, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
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
        **dict.fromkeys(("af678e6a3ed9", "bff3d3addba6"), functools.partial(_heads, casts=True)),
        **dict.fromkeys(("1883fd41ad0d", "358cf3e549ac", "2a195d801e5e"), functools.partial(_heads, in_part=True)),
    },
    "apply_rotary_pos_emb_vision": {"e174399e546c": packed_heads},
}
_ROTATE_HALF = "c3e95bb5f330"  # (−second half, first half)
_WITH_NORMS = ("630b9bbbb2a5", "5e950dbbbeee")  # forwards of Qwen3's kin, of Qwen3-VL's
_RMS_NORM = "7f6be55b177f"
_DEPRECATION = "transformers.utils.deprecation"  # whose decorators rename an argument


def find_rotary(kind: type) -> Swap | None:
    """The swap of an attention whose forward calls a known function; None of others."""
    forward = kind.__dict__.get("forward")
    if not callable(forward) or _with_ours(forward) is None:
        return None
    source = source_hash(forward)
    return Swap(_forward_with_norms if source in _WITH_NORMS else _forward, "norm_rotary", (source,))


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    forward = type(module).forward
    if torch.compiler.is_compiling():
        return forward(module, *args, **kwargs)
    found = _with_ours(forward)
    if found is None or not found.serves(kwargs):
        return forward(module, *args, **kwargs)
    return found.function(module, *args, **kwargs)


def _forward_with_norms(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Of attentions that also normalise each head, as Qwen3's."""
    table = _table_of_normed(module, hidden_states, position_embeddings)
    if table is None or args or "past_key_values" in kwargs:
        return _forward(module, hidden_states, position_embeddings, attention_mask, *args, **kwargs)
    cache = kwargs.pop("cache", None)
    shape = hidden_states.shape[:-1]
    q, k, v = (
        project(hidden_states).view(*shape, -1, module.head_dim).transpose(1, 2)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    norms = {"query_weight": module.q_norm.weight, "key_weight": module.k_norm.weight}
    q, k = norm_rotary(q, k, *table, eps=module.q_norm.variance_epsilon, **norms)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx, kwargs=kwargs)
    names = inspect.unwrap(type(module).forward).__globals__
    attend = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        module.config._attn_implementation, names["eager_attention_forward"]
    )
    dropout = module.attention_dropout if module.training else 0.0
    if hasattr(module, "sliding_window"):
        kwargs["sliding_window"] = module.sliding_window
    out, weights = attend(module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs)
    return module.o_proj(out.reshape(*shape, -1).contiguous()), weights


def _table_of_normed(module: Any, x: Tensor, given: Any) -> tuple[Tensor, Tensor] | None:
    """As `_table`, where the norms are plain ones whose weights have the dtype of everything else."""
    if torch.compiler.is_compiling() or given is None or x.dim() != 3 or given[0].dim() != 3:
        return None
    norms = (module.q_norm, module.k_norm)
    if any(source_hash(type(norm).forward) != _RMS_NORM or not is_plain(norm, type(norm)) for norm in norms):
        return None
    eps = module.q_norm.variance_epsilon
    dtypes = {w.weight.dtype for w in (*norms, module.q_proj, module.k_proj) if isinstance(w.weight, Tensor)}
    if module.k_norm.variance_epsilon != eps or dtypes != {x.dtype} or given[0].dtype != x.dtype:
        return None
    return _table(x, x, *given) if given[0].shape[-1] == module.head_dim else None


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
