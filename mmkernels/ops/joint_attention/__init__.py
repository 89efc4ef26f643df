"""Attention of several streams over all of their keys at once, without their concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.joint_attention.op import joint_attention_op

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["joint_attention"]

_NAME = "joint_attention"


class _Options(TypedDict, total=False):
    """What the overloads take as the signature says."""

    key_lengths: Sequence[Tensor | None] | None
    stream_bias: Tensor | None
    scale: float | None
    softcap: float
    enable_gqa: bool
    dropout_p: float


@overload
def joint_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> list[Tensor]: ...


@overload
def joint_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    return_lse: Literal[True],
    **options: Unpack[_Options],
) -> tuple[list[Tensor], list[Tensor]]: ...


def joint_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    key_lengths: Sequence[Tensor | None] | None = None,
    stream_bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Attention of every query stream over the keys of all streams, as if they were concatenated; nothing is.

        S_ij = scale · Q_i K_jᵀ,  S_ij ← softcap · tanh(S_ij / softcap) if softcap > 0,  S_ij ← S_ij + stream_bias[i, j]
        out_i = dropout(softmax over all keys (S_i1, S_i2, …)) · (V_1; V_2; …)

    Streams of one kind of token each that attend jointly are those of Esser et al., "Scaling Rectified Flow
    Transformers for High-Resolution Image Synthesis", 2024 (arXiv:2403.03206). The numbers of query and of key streams
    may differ: one query stream over several sources is cross-attention to all of them.

    Args:
        queries: Sq tensors (B, Hq, L_i, D), float32, bfloat16, float16, or float64 (reference backend alone). Any
            strides; a last dim that is not contiguous costs a copy of that tensor. Up to 8 streams are fast.
        keys: Sk tensors (B, Hkv, L_j, D), of the queries' dtype and device.
        values: Sk tensors (B, Hkv, L_j, Dv).
        key_lengths: per key stream None or a tensor (B,) of int32 or int64: keys at and beyond the length are padding.
        stream_bias: (Sq, Sk) or (Hq, Sq, Sk), in the queries' dtype or float32: added to all scores of that pair of
            streams; −inf forbids the pair. It may require grad.
        scale: factor of QKᵀ; None = 1/√D.
        softcap: bounds QKᵀ to ±softcap before the bias; 0 = off.
        enable_gqa: Hq may be a multiple of Hkv, the same of all streams; query head h reads key head h // (Hq / Hkv).
        dropout_p: probability with which an entry of the softmax is dropped, the rest being scaled by 1/(1 − p). Always
            applied, training or not. Seeded from torch's default generator; the mask is `cross_attention`'s of the
            concatenated streams.
        return_lse: also return the log-sum-exp of each row of S.

    Returns:
        Sq tensors (B, Hq, L_i, Dv), each in the memory order of its query; with ``return_lse`` also Sq of (B, Hq, L_i),
        natural log, float32 (float64 for float64 inputs), differentiable.

    A row that may attend to nothing gives output 0, lse −inf and gradient 0. What stands in padding or in a forbidden
    stream is never read into the result. Under autocast, floating inputs are cast as torch's own attention casts them.

    Example:
        >>> text, image = torch.randn(2, 8, 77, 64), torch.randn(2, 8, 576, 64)
        >>> [x.shape for x in joint_attention([text, image], [text, image], [text, image])]
        [torch.Size([2, 8, 77, 64]), torch.Size([2, 8, 576, 64])]
    """
    outputs: Any = None
    if key_lengths is None and dropout_p == 0.0 and may_use_door():
        outputs = joint_attention_op.unchecked(
            queries, keys, values, [], [], stream_bias, scale, softcap, 0.0, None, return_lse
        )
    if outputs is None:
        if is_overridden(queries, keys, values, key_lengths, stream_bias):
            return overridden_call(joint_attention, locals())
        inputs = checked_streams(_NAME, queries, keys, values, key_lengths, stream_bias, enable_gqa)
        if scale is not None:
            scale = checks.check_number(_NAME, "scale", scale)
        softcap = attention.check_softcap(_NAME, softcap)
        dropout_p = attention.check_dropout(_NAME, dropout_p)
        rng_state = attention.random_state() if dropout_p > 0.0 else None
        outputs = joint_attention_op(*inputs, scale, softcap, dropout_p, rng_state, bool(return_lse))
    if return_lse:
        count = len(queries)
        return list(outputs[:count]), list(outputs[count:])
    return list(outputs)


def checked_streams(
    op: str,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_lengths: Sequence[Tensor | None] | None,
    stream_bias: Tensor | None,
    enable_gqa: bool,
) -> tuple[Any, ...]:
    """The op's tensors and which streams are padded, once they fit."""
    first = fusion.first_source(op, queries, "queries")
    fusion.first_source(op, keys, "keys")
    fusion.first_source(op, values, "values")
    device = first.device
    if checks.autocast_is_on(device):
        queries, keys, values = fusion.autocast(device, queries, keys, values)
        first = queries[0]
        stream_bias = stream_bias.float() if isinstance(stream_bias, Tensor) else stream_bias
    if first.dtype not in checks.FLOATING:
        raise checks.type_error(op, "queries[0]", "dtype float32, bfloat16, float16 or float64", first.dtype)
    if len(values) != len(keys):
        raise checks.value_error(op, "values", f"{len(keys)} tensors as in keys", len(values))
    for argument, streams in (("queries", queries), ("keys", keys), ("values", values)):
        for i, stream in enumerate(streams):
            checks.check_tensor(op, f"{argument}[{i}]", stream)
            if stream.dim() != 4:
                shape = f"shape {tuple(stream.shape)}"
                raise checks.value_error(op, f"{argument}[{i}]", "4 dims (B, H, L, D)", shape)
            fusion.check_kind(op, f"{argument}[{i}]", stream, first, "queries[0]")
    batch, heads, _, features = first.shape
    key_heads, width = keys[0].shape[1] if enable_gqa else heads, values[0].shape[3]
    if key_heads != heads and (key_heads == 0 or heads % key_heads != 0):
        raise checks.value_error(op, "keys[0]", f"a number of heads that divides the queries' {heads}", key_heads)
    for argument, streams, of_streams in (("queries", queries, heads), ("keys", keys, key_heads)):
        for i, stream in enumerate(streams):
            _check_shape(op, f"{argument}[{i}]", stream, (batch, of_streams, None, features))
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        _check_shape(op, f"values[{i}]", value, (batch, key_heads, key.shape[2], width))
    rows, columns = (sum(stream.shape[2] for stream in streams) for streams in (queries, keys))
    checks.check_count(op, "keys", "scores", batch, heads, rows, columns)
    lengths, padded_streams = [], []
    if key_lengths is not None:
        if not isinstance(key_lengths, (list, tuple)):
            raise checks.type_error(op, "key_lengths", "a list of tensors or None", type(key_lengths).__name__)
        if len(key_lengths) != len(keys):
            raise checks.value_error(op, "key_lengths", f"{len(keys)} entries, one per key stream", len(key_lengths))
        for i, (given, key) in enumerate(zip(key_lengths, keys, strict=True)):
            if given is not None:
                lengths.append(attention.check_key_lengths(op, f"key_lengths[{i}]", given, first, key.shape[2]))
                padded_streams.append(i)
    if stream_bias is not None:
        _check_bias(op, stream_bias, first, len(queries), len(keys))
    return list(queries), list(keys), list(values), lengths, padded_streams, stream_bias


def _check_shape(op: str, argument: str, stream: Tensor, shape: tuple[int | None, ...]) -> None:
    if any(want is not None and size != want for size, want in zip(stream.shape, shape, strict=True)):
        expected = fusion.shape_text(tuple("L" if n is None else n for n in shape))
        raise checks.value_error(op, argument, f"shape {expected}", tuple(stream.shape))


def _check_bias(op: str, bias: Tensor, first: Tensor, queries: int, keys: int) -> None:
    checks.check_tensor(op, "stream_bias", bias)
    if bias.dtype not in (first.dtype, torch.float32):
        raise checks.type_error(op, "stream_bias", f"dtype {first.dtype} or torch.float32", bias.dtype)
    checks.check_same_device(op, "stream_bias", bias, "queries[0]", first.device)
    if bias.shape not in ((queries, keys), (first.shape[1], queries, keys)):
        expected = f"shape {(queries, keys)} or {(first.shape[1], queries, keys)}"
        raise checks.value_error(op, "stream_bias", expected, tuple(bias.shape))
