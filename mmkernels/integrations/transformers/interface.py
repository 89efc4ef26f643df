"""The attention function and the mask function of ``attn_implementation="mmkernels"``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.output_capturing import _active_collector

from mmkernels.integrations._blocks import masking, prefix_lengths
from mmkernels.ops.cross_attention import cross_attention

__all__ = ["attention", "attention_mask", "weights_are_captured"]

_COMPACT = "_mmkernels_compact"


@dataclass(frozen=True)
class CompactMask:
    """What a dense mask says, as options of cross_attention. ``version`` is the dense one's when they said the same."""

    options: dict[str, Any]
    version: int


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The bool mask of a model, [B, 1, Lq, Lk], True = attend, as sdpa's; None = everybody attends to all.

    Masks that cross_attention can say by causal order, a window and key lengths carry these beside the dense form,
    which stays for models that take it apart. A causal mask is never None: whether an absent mask means causal order
    would be for the module to say, and not all do.
    """
    options["allow_is_causal_skip"] = False
    dense = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )
    if dense is None or dense.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return dense
    compact = _compact(q_length, kv_length, int(q_offset), kv_offset, mask_function, attention_mask)
    if compact is not None:
        dense.__dict__[_COMPACT] = CompactMask(compact, _version(dense))
    return dense


def _version(mask: Tensor) -> int:
    return 0 if mask.is_inference() else mask._version


def _compact(
    q_length: int, kv_length: int, q_offset: int, kv_offset: int, function: Callable[..., Any], padding: Tensor | None
) -> dict[str, Any] | None:
    band = _band(function)
    if band is None:
        return None
    options: dict[str, Any] = {}
    valid = kv_length
    if padding is not None:
        keep = padding[:, kv_offset : kv_offset + kv_length]
        lengths = prefix_lengths(keep)
        if lengths is None:
            return None
        shortest, longest = int(lengths.min()), int(lengths.max())
        if shortest < kv_length:
            options["key_lengths"] = lengths
        valid = longest if shortest == longest else -1  # -1: lengths of their own
    left, right = band
    if left < 0 and right < 0:
        return options
    # With the diagonal at the top left query i sits on key i, at the bottom right the last query on the last valid key.
    ahead = q_offset - kv_offset
    if ahead == 0:
        alignment = "top_left"
    elif ahead + q_length in (valid, kv_length if padding is None else -1):
        alignment = "bottom_right"
    elif padding is None and 0 < ahead + q_length <= kv_length:  # a static cache: keys to come are no keys yet
        return None
    else:
        return None
    options["causal_alignment"] = alignment
    options["is_causal"] = right == 0
    if left >= 0 or right > 0:
        options["window"] = (left, right)
    return options


def _band(function: Callable[..., Any]) -> tuple[int, int] | None:
    """How many keys before and after its own position a query attends to, -1 = all; None if it is no such mask."""
    if function is bidirectional_mask_function:
        return -1, -1
    if function is causal_mask_function:
        return -1, 0
    name, cells = getattr(function, "__qualname__", ""), _closure(function)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return int(cells["sliding_window"]) - 1, -1
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        return int(cells["sliding_window"]), int(cells["sliding_window"])
    if name != "and_masks.<locals>.and_mask":
        return None
    left = right = -1
    for part in cells["mask_functions"]:
        band = _band(part)
        if band is None:
            return None
        left, right = _narrower(left, band[0]), _narrower(right, band[1])
    return left, right


def _narrower(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def weights_are_captured() -> bool:
    """Whether a model above collects attention weights from the outputs of its attentions."""
    collected = _active_collector.get()
    return bool(collected) and any("attentions" in key for key in collected)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' interface has it: query (B, H, Lq, D) → (B, Lq, H, D), and no weights.

    Where weights are asked for, the model's own eager attention runs.
    """
    if kwargs.get("output_attentions") or weights_are_captured():
        return _eager(
            module, query, key, value, attention_mask, scaling, dropout, softcap, position_bias, s_aux, kwargs
        )
    q_length = query.shape[2]
    options = _options(attention_mask, query.shape[0])
    if attention_mask is None and q_length > 1:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        options = {"is_causal": bool(causal)}
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        options = {"attn_mask": attention_mask[..., : key.shape[2]]}
    if position_bias is not None:
        options["attn_bias"] = position_bias[..., : key.shape[2]]
    out = cross_attention(
        query,
        key,
        value,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        enable_gqa=key.shape[1] != query.shape[1],
        **options,
    )
    return out.transpose(1, 2).contiguous(), None


def _options(mask: Tensor | None, batch: int) -> dict[str, Any]:
    if mask is None:
        return {}
    if not torch.compiler.is_compiling():
        compact = mask.__dict__.get(_COMPACT)
        if compact is not None and compact.version == _version(mask):
            return dict(compact.options)
    return dict(masking(mask, batch))


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention of the module's own file, which returns the weights and takes additive masks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(f"{type(module).__name__}: attention weights: its file has no eager attention")
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros((), dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    given = {"softcap": softcap, "position_bias": position_bias, "s_aux": sinks}
    kwargs = {**kwargs, **{name: x for name, x in given.items() if x is not None}}
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
