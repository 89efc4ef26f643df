"""The attention backend of diffusers' models, ``model.set_attention_backend("mmkernels")``."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_dispatch
from torch import Tensor

from mmkernels.integrations._blocks import SERVED, masking
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["register"]

_NAME, _MEMBER = "mmkernels", "MMKERNELS"


def register() -> None:
    """Make ``model.set_attention_backend("mmkernels")`` of diffusers mean this library's attention.

    It serves every model whose processors call diffusers' dispatcher: FLUX, Qwen-Image, Wan and two dozen others. A
    mask over keys that ends with padding becomes ``key_lengths``, so that what it hides is not computed. float64, and
    attention over several processes, run diffusers' "native" backend. Registering twice changes nothing.

    Raises:
        RuntimeError: this release of diffusers has no registry of attention backends as it is known.
    """
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    names = getattr(attention_dispatch, "AttentionBackendName", None)
    if registry is None or names is None or not hasattr(registry, "register"):
        raise RuntimeError("register: expected a diffusers with _AttentionBackendRegistry; got one without")
    if _MEMBER not in names.__members__:
        _add_member(names)
    registry.register(names(_NAME), constraints=[])(_attention)


def _add_member(names: Any) -> None:
    """The enumeration is of what diffusers has itself; a model's backend is looked up in it."""
    member = str.__new__(names, _NAME)
    member._name_, member._value_ = _MEMBER, _NAME
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    names._member_names_.append(_MEMBER)
    names._member_map_[_MEMBER] = member
    names._value2member_map_[_NAME] = member
    type.__setattr__(names, _MEMBER, member)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """(B, L, H, D), as diffusers has it."""
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    mixed = {query.dtype, key.dtype, value.dtype} != {query.dtype}
    if query.dtype not in SERVED or mixed or _parallel_config is not None or (is_causal and attn_mask is not None):
        native = attention_dispatch._native_attention
        options = {"scale": scale, "enable_gqa": enable_gqa, "_parallel_config": _parallel_config}
        return native(query, key, value, attn_mask, dropout_p, is_causal, **options)  # type: ignore[no-any-return]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = masking(attn_mask, query.shape[0]) | {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return cross_attention(q, k, v, dropout_p=dropout_p, **options).transpose(1, 2)
