"""norm_rotary: the norm of every head's queries and keys and their rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops.norm_rotary.op import norm_rotary_op

__all__ = ["norm_rotary"]

_NAME = "norm_rotary"


def norm_rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of queries and keys, then rotate its first R features by the angles of its position.

        n = x / √(mean x² + eps) ∘ weight  where a weight is given, else x
        (y_a, y_b) = (n_a cos_i − n_b sin_i,  n_b cos_i + n_a sin_i),   a, b = i, i + R/2, or interleaved 2i, 2i + 1

    Rotary position embedding is that of Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_; the norm of queries
    and keys that of `ViT-22B <https://arxiv.org/abs/2302.05442>`_, with RMSNorm as in FLUX and Qwen3.

    Args:
        query: (B, H, L, D), or packed as `varlen_cross_attention` takes it, (L, H, D); float32, bfloat16, float16, or
            float64 (reference backend alone). Any strides; a last dim that is not contiguous costs a copy of that
            tensor.
        key: (B, Hk, L, D), or packed (L, Hk, D), of query's dtype and device.
        cos: (L, R/2), or (B or 1, L, R/2) with queries that are not packed; R ≤ D. Of query's dtype or float32, as sin
            and the weights.
        sin: of cos' shape and dtype.
        query_weight: (D,): the norm's factors for queries; None = queries are not normalised.
        key_weight: the same for keys.
        eps: of the norm.
        interleaved: whether neighbours are rotated, as in FLUX and GPT-J, or halves, as in LLaMA.

    Returns:
        The new queries and keys, each in the memory order of the old. Sums and rotation are float32 for every dtype,
        rounded once. Differentiable in queries, keys and weights, and in cos and sin too (learned frequencies).

    Under autocast, query and key of different dtypes are promoted to the wider, and cos, sin and weights whose dtype
    does not fit are cast to it.

    Example:
        >>> query, key = torch.randn(2, 8, 64, 32), torch.randn(2, 2, 64, 32)
        >>> angle = torch.arange(64)[:, None] * 10000.0 ** (-torch.arange(16) / 16)
        >>> query, key = norm_rotary(query, key, angle.cos(), angle.sin())
        >>> query.shape, key.shape
        (torch.Size([2, 8, 64, 32]), torch.Size([2, 2, 64, 32]))
    """
    if may_use_door():
        out = norm_rotary_op.unchecked(query, key, cos, sin, query_weight, key_weight, eps, interleaved)
        if out is not None:
            return tuple(out)
    if is_overridden(query, key, cos, sin, query_weight, key_weight):
        return overridden_call(norm_rotary, locals())
    for argument, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        checks.check_tensor(_NAME, argument, tensor)
    for argument, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None:
            checks.check_tensor(_NAME, argument, weight)
    if checks.autocast_is_on(query.device):
        query, key = checks.autocast_promoted(query, key)
        cos, sin, query_weight, key_weight = _fitting(query, cos, sin, query_weight, key_weight)
    if query.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "query", "dtype float32, bfloat16, float16 or float64", query.dtype)
    if query.dim() not in (3, 4):
        got = f"shape {tuple(query.shape)}"
        raise checks.value_error(_NAME, "query", "4 dims (B, H, L, D), or 3 of packed ones (L, H, D)", got)
    checks.check_same_kind(_NAME, query, "query", key=key)
    _check_shapes(query, key, cos, sin)
    features = query.shape[-1]
    given = {"cos": cos, "sin": sin, "query_weight": query_weight, "key_weight": key_weight}
    for argument, table in given.items():
        if table is None:
            continue
        if table.dtype not in (query.dtype, torch.float32):
            expected = f"the dtype of query, {query.dtype}, or torch.float32"
            raise checks.type_error(_NAME, argument, expected, table.dtype)
        checks.check_same_device(_NAME, argument, table, "query", query.device)
        if argument.endswith("weight") and (table.dim() != 1 or table.shape[0] != features):
            raise checks.value_error(_NAME, argument, f"shape ({features},)", tuple(table.shape))
    for argument, one, other in (("sin", sin, cos), ("key_weight", key_weight, query_weight)):
        if one is not None and other is not None and one.dtype != other.dtype:
            name = "cos" if argument == "sin" else "query_weight"
            raise checks.type_error(_NAME, argument, f"the dtype of {name}, {other.dtype}", one.dtype)
    eps = checks.check_number(_NAME, "eps", eps)
    if not isinstance(interleaved, bool):
        raise checks.type_error(_NAME, "interleaved", "a bool", type(interleaved).__name__)
    q, k = norm_rotary_op(query, key, cos, sin, query_weight, key_weight, float(eps), interleaved)
    return q, k


def _fitting(query: Tensor, *tables: Tensor | None) -> tuple[Tensor, ...]:
    """The tables, those of a dtype that does not go with query's in query's."""
    dtypes = {t.dtype for t in tables if t is not None}
    fit = dtypes <= {query.dtype, torch.float32}
    # An absent tensor stays None; the annotation spares the caller the same union for each of theirs.
    return tuple(t if t is None or fit else t.to(query.dtype) for t in tables)  # type: ignore[misc]


def _check_shapes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    packed = query.dim() == 3
    length, features = query.shape[0 if packed else 2], query.shape[-1]
    if (
        key.dim() != query.dim()
        or key.shape[0] != query.shape[0]
        or key.shape[-1] != features
        or key.shape[0 if packed else 2] != length
    ):
        expected = f"({length}, Hk, {features})" if packed else f"({query.shape[0]}, Hk, {length}, {features})"
        raise checks.value_error(_NAME, "key", f"shape {expected}", tuple(key.shape))
    fits = cos.dim() == 2 or (cos.dim() == 3 and not packed and cos.shape[0] in (1, query.shape[0]))
    if not fits or cos.shape[-2] != length or 2 * cos.shape[-1] > features:
        batched = "" if packed else f" or ({query.shape[0]}, {length}, R/2)"
        expected = f"shape ({length}, R/2){batched}, R at most {features}"
        raise checks.value_error(_NAME, "cos", expected, tuple(cos.shape))
    if sin.shape != cos.shape:
        raise checks.value_error(_NAME, "sin", f"the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))
