"""Attention of queries over the keys and values of another modality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops.cross_attention.op import cross_attention_op, unexpanded

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["cross_attention", "scaled_dot_product_attention"]


@overload
def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[attention.CrossOptions],
) -> Tensor: ...


@overload
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: Unpack[attention.CrossOptions]
) -> tuple[Tensor, Tensor]: ...


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: attention.CausalAlignment = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ``query`` over ``key`` and ``value``, without ever holding the Lq×Lk scores.

        S = scale · Q Kᵀ,  S ← softcap · tanh(S / softcap) if softcap > 0,  S ← S + attn_mask + attn_bias,
        out = dropout(P) · V,  P = softmax(S), or with sinks exp(S) / (Σ exp(S) + exp(sink))

    Scaled dot-product attention is Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762); computing it
    in tiles with a running softmax is Dao et al., "FlashAttention", 2022 (arXiv:2205.14135); a learned logit that takes
    weight and gives nothing is Miller, "Attention Is Off By One", 2023, and OpenAI's gpt-oss (arXiv:2508.10925).

    Args:
        query: (B, Hq, Lq, D), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last
            dim that is not contiguous costs a copy of that tensor. The output takes its memory order.
            A batch of 1 is broadcast to that of the others, for each of query, key and value.
        key: (B, Hkv, Lk, D), of query's dtype and device.
        value: (B, Hkv, Lk, Dv), of query's dtype and device. Dv may differ from D.
        attn_mask: 2-D to 4-D, broadcastable to (B, Hq, Lq, Lk), never expanded in memory. bool: True = attend. Float,
            of any floating dtype: added to S; −inf forbids. It may require grad.
        attn_bias: float, broadcastable as ``attn_mask``: added to S beside it, each in a shape and dtype of its own.
        sinks: (Hq,) of any floating dtype, read in float32: a logit per query head that joins the softmax's denominator
            and attends to nothing; −inf is none. Softcap, masks and dropout leave it alone.
        key_lengths: (B,) int32 or int64: keys at and beyond the length are padding.
        is_causal: a query attends to no key after its diagonal position. Combines with the other masks.
        causal_alignment: "top_left": query i has diagonal position i, as in torch. "bottom_right": the last query sits
            on the last valid key, as in flash-attention; with ``key_lengths`` that differs per batch element.
        window: (left, right): a query attends to keys from ``left`` before to ``right`` after its diagonal position;
            −1 = unbounded on that side.
        softcap: bounds S to ±softcap; 0 = off.
        scale: factor of QKᵀ; None = 1/√D.
        enable_gqa: Hq may be a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
        dropout_p: probability with which an entry of softmax(S) is dropped, the rest being scaled by 1/(1 − p). Always
            applied, training or not. Seeded from torch's default generator; forward and backward draw the same mask.
        return_lse: also return the log-sum-exp of each row of S, its sink included.

    Returns:
        out (B, Hq, Lq, Dv) in query's dtype, and with ``return_lse`` also lse (B, Hq, Lq), natural log, float32
        (float64 for float64 inputs), differentiable.

    A row that may attend to nothing gives output 0, lse −inf (with sinks, its sink) and gradient 0. With any mask, a
    key whose K or V row holds NaN or inf turns the query rows that may attend to it into NaN and touches no other row.
    Under autocast, query, key and value are cast as torch's own attention casts them; masks and sinks are not.

    Example:
        >>> text, image = torch.randn(2, 8, 77, 64), torch.randn(2, 8, 576, 64)
        >>> cross_attention(text, image, image, key_lengths=torch.tensor([576, 196])).shape
        torch.Size([2, 8, 77, 64])
    """
    aligned = causal_alignment == "top_left" or causal_alignment == "bottom_right"
    if aligned and (window is None or (type(window) is tuple and len(window) == 2)) and may_use_door():
        left, right = (-1, -1) if window is None else window
        outputs = cross_attention_op.unchecked(
            *(query, key, value, attn_mask, attn_bias, sinks, key_lengths),
            *(left, 0 if is_causal else right, causal_alignment == "bottom_right"),
            *(softcap, scale, dropout_p, None, enable_gqa, return_lse),
        )
        if outputs is not None:
            return (outputs[0], outputs[1]) if return_lse else outputs[0]
    if is_overridden(query, key, value, attn_mask, attn_bias, sinks, key_lengths):
        return overridden_call(cross_attention, locals())
    name = "cross_attention"
    query, key, value = check_inputs(name, query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = check_mask(name, "attn_mask", attn_mask, query, key.shape[2])
    if attn_bias is not None:
        attn_bias = check_mask(name, "attn_bias", attn_bias, query, key.shape[2])
        if attn_mask is None:
            attn_mask, attn_bias = attn_bias, None
    if sinks is not None:
        sinks = attention.check_sinks(name, sinks, query, query.shape[1])
    if key_lengths is not None:
        key_lengths = attention.check_key_lengths(name, "key_lengths", key_lengths, query, key.shape[2])
    left, right = (-1, -1) if window is None else attention.check_window(name, window)
    if is_causal:
        right = 0
    bottom_right = attention.is_bottom_right(name, causal_alignment)
    if type(softcap) is not float or softcap != 0.0:
        softcap = attention.check_softcap(name, softcap)
    masks = (attn_mask, attn_bias, sinks, key_lengths)
    outputs = _attend(
        name, query, key, value, masks, (left, right, bottom_right), softcap, scale, dropout_p, return_lse
    )
    return (outputs[0], outputs[1]) if return_lse else outputs[0]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for ``torch.nn.functional.scaled_dot_product_attention``, same signature and semantics.

    Args:
        query: (..., Hq, Lq, D), at least 2-D. Leading dims broadcast between the three, as in torch.
        key: (..., Hkv, Lk, D).
        value: (..., Hkv, Lk, Dv).
        attn_mask: broadcastable to (..., Hq, Lq, Lk), bool (True = attend) or float (added); exclusive with
            ``is_causal``.
        dropout_p: see `cross_attention`; always applied.
        is_causal: query i attends to keys 0 … i.
        scale: factor of QKᵀ; None = 1/√D.
        enable_gqa: Hq may be a multiple of Hkv.

    Returns:
        (..., Hq, Lq, Dv).

    Jagged ``NestedTensor``s (B, H, rows, D) run packed, as in `varlen_cross_attention`; with a mask or dropout, and of
    the strided layout, torch's own function serves them. For more than four dims, a mask that varies over some but not
    all of the dims before the heads is repeated over those; over heads, queries and keys a mask is never expanded.
    Errors as in `cross_attention`.
    """
    if (attn_mask is None or not is_causal) and may_use_door():
        outputs = cross_attention_op.unchecked(
            *(query, key, value, attn_mask, None, None, None, -1, 0 if is_causal else -1, False),
            *(0.0, scale, dropout_p, None, enable_gqa, False),
        )
        if outputs is not None:
            return outputs[0]
    if is_overridden(query, key, value, attn_mask):
        return overridden_call(scaled_dot_product_attention, locals())
    name = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise checks.value_error(name, "attn_mask", "None where is_causal=True", "both")
    if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
        from mmkernels.ops.varlen_cross_attention import nested  # which is made of this package

        return nested.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(name, argument, tensor)
    lead: torch.Size | None = None
    if not _leading_dims_agree(query, key, value, enable_gqa):
        query, key, value, attn_mask, lead = _fold_leading_dims(name, query, key, value, attn_mask, enable_gqa)
    query, key, value = check_inputs(name, query, key, value, enable_gqa)
    if attn_mask is not None:
        attn_mask = check_mask(name, "attn_mask", attn_mask, query, key.shape[2])
    masks, window = (attn_mask, None, None, None), (-1, 0 if is_causal else -1, False)
    out = _attend(name, query, key, value, masks, window, 0.0, scale, dropout_p, False)[0]
    return out if lead is None else out.reshape(*lead, *out.shape[2:])


def _attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor | None, ...],  # attn_mask, attn_bias, sinks, key_lengths
    window: tuple[int, int, bool],  # left, right, bottom_right
    softcap: float,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
) -> Sequence[Tensor]:
    """The output, and the LSE where it is wanted, of checked inputs."""
    if scale is not None:
        scale = checks.check_number(name, "scale", scale)
    rng_state = None
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = attention.check_dropout(name, dropout_p)
        rng_state = attention.random_state() if dropout_p > 0.0 else None
    options = (softcap, scale, dropout_p, rng_state, True, bool(return_lse))
    return cross_attention_op(query, key, value, *masks, *window, *options)


def check_inputs(op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, cast where autocast is on, once their types, dtypes, devices and shapes fit."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if (
            not isinstance(tensor, Tensor)
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or tensor.dim() != 4
        ):
            checks.check_tensor(op, argument, tensor)
            raise checks.value_error(op, argument, "4 dims (B, H, L, D)", f"shape {tuple(tensor.shape)}")
    device, dtype = query.device, query.dtype
    if checks.autocast_is_on(device):
        query, key, value = checks.autocast_inputs(device, query, key, value)
        dtype = query.dtype
    if key.dtype != dtype or value.dtype != dtype or key.device != device or value.device != device:
        checks.check_same_kind(op, query, "query", key=key, value=value)
    if dtype not in checks.FLOATING:
        raise checks.type_error(op, "query", "dtype float32, bfloat16, float16 or float64", dtype)
    batch, heads, _, head_dim = query.shape
    key_batch, key_heads, key_len, key_dim = key.shape
    value_batch, value_heads, value_len, _ = value.shape
    if key_batch != batch or value_batch != batch:
        query, key, value = _with_one_batch(op, query, key, value)
    if key_dim != head_dim:
        raise checks.value_error(op, "key", f"shape ({batch}, Hkv, Lk, {head_dim})", tuple(key.shape))
    if value_heads != key_heads or value_len != key_len:
        raise checks.value_error(op, "value", f"shape ({key_batch}, {key_heads}, {key_len}, Dv)", tuple(value.shape))
    checks.check_count(op, "key", "scores", *query.shape[:3], key_len)
    if key_heads != heads:
        if not enable_gqa:
            raise checks.value_error(op, "key", f"{heads} heads as in query (or enable_gqa=True)", f"{key_heads} heads")
        if key_heads == 0 or heads % key_heads != 0:
            raise checks.value_error(op, "key", f"a number of heads that divides query's {heads}", key_heads)
    return query, key, value


def _with_one_batch(op: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with those of batch 1 expanded to the batch of the others."""
    batch = next((t.shape[0] for t in (query, key, value) if t.shape[0] != 1), 1)
    if key.shape[0] not in (1, batch):
        expected = f"shape ({batch}, Hkv, Lk, {query.shape[3]}), or a batch of 1"
        raise checks.value_error(op, "key", expected, tuple(key.shape))
    if value.shape[0] not in (1, batch):
        expected = f"shape ({batch}, {key.shape[1]}, {key.shape[2]}, Dv), or a batch of 1"
        raise checks.value_error(op, "value", expected, tuple(value.shape))
    query, key, value = (t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (query, key, value))
    return query, key, value


def check_mask(op: str, argument: str, mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """The mask over so many keys with 4 dims, bool, in query's dtype, or wider."""
    checks.check_tensor(op, argument, mask)
    is_bias = argument == "attn_bias"
    if not mask.is_floating_point() and (is_bias or mask.dtype != torch.bool):
        raise checks.type_error(
            op, argument, "a floating dtype" if is_bias else "dtype bool or a floating one", mask.dtype
        )
    checks.check_same_device(op, argument, mask, "query", query.device)
    full = (*query.shape[:3], keys)
    if not 2 <= mask.dim() <= 4:
        raise checks.value_error(op, argument, "2 to 4 dims", f"shape {tuple(mask.shape)}")
    for size, full_size in zip(mask.shape, full[4 - mask.dim() :], strict=True):
        if size != full_size and size != 1:
            expected = f"a shape broadcastable to {tuple(full)}"
            if tuple(mask.shape) == (full[0], full[3]):
                expected += f" (for one of keys per batch element {argument}[:, None, None], or key_lengths)"
            raise checks.value_error(op, argument, expected, tuple(mask.shape))
    if mask.dim() < 4:
        mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype in (torch.bool, torch.float32, query.dtype):
        return mask
    if not mask.requires_grad:  # else each of its elements has a gradient of its own
        mask = unexpanded(mask)
    return mask.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def _leading_dims_agree(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the inputs are (B, H, L, D) as they are, with nothing to fold or to broadcast."""
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return False
    batch, heads = query.shape[:2]
    key_batch, key_heads = key.shape[:2]
    return key_batch == batch == value.shape[0] and (enable_gqa or key_heads == heads == value.shape[1])


def _fold_leading_dims(
    op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Size]:
    """The inputs with leading dims broadcast and folded to (B, H), and the output's leading dims."""
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise checks.value_error(op, argument, "at least 2 dims (..., L, D)", f"shape {tuple(tensor.shape)}")
    leads = [tensor.shape[:-2] for tensor in (query, key, value)]
    if enable_gqa:  # heads differ and stay apart
        heads = [lead[-1:] for lead in leads]
        leads = [lead[:-1] for lead in leads]
    try:
        common = torch.broadcast_shapes(*leads)
        if not enable_gqa:
            heads = [common[-1:]] * 3
            common = common[:-1]
    except RuntimeError:
        shapes = [tuple(t.shape) for t in (query, key, value)]
        raise checks.value_error(
            op, "key", "leading dims that broadcast between query, key and value", shapes
        ) from None
    batch = math.prod(common)
    query, key, value = (
        t.expand(*common, *h, *t.shape[-2:]).reshape(batch, *(h or (1,)), *t.shape[-2:])
        for t, h in zip((query, key, value), heads, strict=True)
    )
    lead = torch.Size((*common, *heads[0]))
    if isinstance(attn_mask, Tensor):
        attn_mask = _fold_mask(op, attn_mask, lead, query, key)
    return query, key, value, attn_mask, lead


def _fold_mask(op: str, mask: Tensor, lead: torch.Size, query: Tensor, key: Tensor) -> Tensor:
    """The mask with its leading dims folded as the inputs' are, expanded over no more of them than it must be."""
    full = (*lead, query.shape[2], key.shape[2])
    sizes = mask.shape
    fits = 2 <= len(sizes) <= len(full) and all(
        size in (1, want) for size, want in zip(sizes, full[len(full) - len(sizes) :], strict=True)
    )
    if not fits:
        raise checks.value_error(op, "attn_mask", f"a shape broadcastable to {full}", tuple(sizes))
    mask = mask[(None,) * (len(full) - mask.dim())]
    if len(lead) == 0:
        return mask[None, None]
    batch_sizes = mask.shape[: len(lead) - 1]
    if any(size != 1 for size in batch_sizes):
        mask = mask.expand(*lead[:-1], *mask.shape[len(lead) - 1 :])
    return mask.reshape(-1 if 0 not in mask.shape else query.shape[0], *mask.shape[len(lead) - 1 :])
