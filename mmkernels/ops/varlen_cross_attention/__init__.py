"""Attention of a packed batch, whose members have queries and keys of any length."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops.varlen_cross_attention.op import varlen_cross_attention_op

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["varlen_cross_attention"]

_NAME = "varlen_cross_attention"


@overload
def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[attention.PackedOptions],
) -> Tensor: ...


@overload
def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[attention.PackedOptions],
) -> tuple[Tensor, Tensor]: ...


def varlen_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    causal_alignment: attention.CausalAlignment = "bottom_right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_attention` of every member of a packed batch, without padding and without copies.

    The layout is that of flash-attention's variable-length functions (Dao, "FlashAttention-2", 2023, arXiv:2307.08691):
    member b has the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the key rows ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]``. Either may be none, and the two lengths have nothing to do with one another.

    Args:
        query: (Tq, Hq, D), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim
            that is not contiguous costs a copy of that tensor.
        key: (Tk, Hkv, D), of query's dtype and device. Hq is a multiple of Hkv: query head h reads key head
            h // (Hq / Hkv).
        value: (Tk, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 or int64, from 0 to Tq in order.
        cu_seqlens_k: (B + 1,) int32 or int64, from 0 to Tk in order.
        max_seqlen_q: no member has more queries.
        max_seqlen_k: no member has more keys.
        is_causal: a query attends to no key after its diagonal position.
        causal_alignment: "bottom_right": a member's last query sits on its last key, as in flash-attention; "top_left":
            its first on its first.
        window: (left, right): a query attends to keys from ``left`` before to ``right`` after its diagonal position;
            −1 = unbounded on that side.
        softcap: bounds the scores to ±softcap; 0 = off.
        sinks: (Hq,) of any floating dtype, read in float32: a logit per query head that joins the softmax's denominator
            and attends to nothing; −inf is none.
        scale: factor of QKᵀ; None = 1/√D.
        return_lse: also return the log-sum-exp of each row of scores, its sink included.

    Returns:
        out (Tq, Hq, Dv), in query's memory order, and with ``return_lse`` also lse (Tq, Hq), natural log, float32
        (float64 for float64 inputs), differentiable.

    A row that may attend to nothing gives output 0, lse −inf (with sinks, its sink) and gradient 0.

    Example:
        >>> text, image = torch.randn(40, 8, 64), torch.randn(700, 2, 64)
        >>> texts, images = torch.tensor([0, 30, 40]), torch.tensor([0, 124, 700])
        >>> varlen_cross_attention(text, image, image, texts, images, 30, 576).shape
        torch.Size([40, 8, 64])
    """
    left, right = (-1, -1) if window is None else attention.check_window(_NAME, window)
    if is_causal:
        right = 0
    bottom_right = attention.is_bottom_right(_NAME, causal_alignment)
    starts = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (left, right, bottom_right, scale, softcap)
    outputs: Any = None
    if may_use_door():
        outputs = varlen_cross_attention_op.unchecked(query, key, value, *starts, *options, sinks, return_lse)
    if outputs is None:
        if is_overridden(query, key, value, cu_seqlens_q, cu_seqlens_k, sinks):
            return overridden_call(varlen_cross_attention, locals())
        longest = [
            min(checks.check_index(_NAME, f"max_seqlen_{x}", n), attention.LONGEST)
            for x, n in (("q", max_seqlen_q), ("k", max_seqlen_k))
        ]
        inputs = _checked(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest)
        if scale is not None:
            scale = checks.check_number(_NAME, "scale", scale)
        softcap = attention.check_softcap(_NAME, softcap)
        options = (left, right, bottom_right, scale, softcap)
        if sinks is not None:
            sinks = attention.check_sinks(_NAME, sinks, query, query.shape[1])
        outputs = varlen_cross_attention_op(
            *inputs, cu_seqlens_q, cu_seqlens_k, *longest, *options, sinks, bool(return_lse)
        )
    out, lse = outputs
    return (out, lse) if return_lse else out


def _checked(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, cast where autocast is on, once everything fits."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(_NAME, argument, tensor)
        if tensor.dim() != 3:
            raise checks.value_error(_NAME, argument, "3 dims (T, H, D)", f"shape {tuple(tensor.shape)}")
    device = query.device
    if checks.autocast_is_on(device):
        query, key, value = checks.autocast_inputs(device, query, key, value)
    if query.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "query", "dtype float32, bfloat16, float16 or float64", query.dtype)
    checks.check_same_kind(_NAME, query, "query", key=key, value=value)
    rows, heads, features = query.shape
    if key.shape[2] != features:
        raise checks.value_error(_NAME, "key", f"shape (Tk, Hkv, {features})", tuple(key.shape))
    if value.shape[:2] != key.shape[:2]:
        expected = f"shape ({key.shape[0]}, {key.shape[1]}, Dv)"
        raise checks.value_error(_NAME, "value", expected, tuple(value.shape))
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise checks.value_error(_NAME, "key", f"a number of heads that divides query's {heads}", key.shape[1])
    checks.check_count(_NAME, "key", "scores", rows, heads, key.shape[0])
    for name, starts, total, longest in (("q", cu_seqlens_q, rows, max_q), ("k", cu_seqlens_k, key.shape[0], max_k)):
        _check_starts(f"cu_seqlens_{name}", starts, total, f"max_seqlen_{name}", longest, device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"shape {tuple(cu_seqlens_q.shape)} as cu_seqlens_q"
        raise checks.value_error(_NAME, "cu_seqlens_k", expected, tuple(cu_seqlens_k.shape))
    return query, key, value


def _check_starts(
    argument: str, starts: Tensor, total: int, max_argument: str, longest: int, device: torch.device
) -> None:
    checks.check_tensor(_NAME, argument, starts)
    if starts.dtype not in (torch.int32, torch.int64):
        raise checks.type_error(_NAME, argument, "dtype int32 or int64", starts.dtype)
    if starts.dim() != 1 or starts.shape[0] == 0:
        raise checks.value_error(_NAME, argument, "shape (B + 1,)", tuple(starts.shape))
    checks.check_same_device(_NAME, argument, starts, "query", device)
    if not checks.eager_values_readable(starts):
        return
    values = starts.tolist()
    lengths = [end - start for start, end in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
        raise checks.value_error(_NAME, argument, f"starts from 0 to {total} in order", values)
    if max(lengths, default=0) > longest:
        raise checks.value_error(_NAME, max_argument, f"at least the longest member, {max(lengths)}", longest)
