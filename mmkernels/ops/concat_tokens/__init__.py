"""concat_tokens: tokens of several modalities in one sequence, with their embeddings and a norm, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops._norm import check_norm
from mmkernels.ops.concat_tokens.op import concat_tokens_op

_NAME = "concat_tokens"


def concat_tokens(
    xs: Sequence[Tensor],
    *,
    type_embedding: Tensor | None = None,
    position_embeddings: Sequence[Tensor | None] | None = None,
    norm: Literal["layer", "rms"] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Concatenate token sequences, add type and position embeddings, normalise: one pass over the tokens.

    The input layer of single-stream models such as `ViLT <https://arxiv.org/abs/2102.03334>`_ and
    `UNITER <https://arxiv.org/abs/1909.11740>`_.

    Args:
        xs: M tensors (B, L_i, C), one per modality, float32, bfloat16, float16, or float64 (reference backend alone).
            Any strides; a last dim that is not contiguous costs a copy of that tensor. L_i may be 0.
        type_embedding: (M, C); row i is added to every token of modality i. Of xs' dtype and device, as all tensors.
        position_embeddings: one per modality, (L_i, C), added to the tokens of every batch element, or None.
        norm: "layer": (x − mean) / √(variance + eps); "rms": x / √(mean x² + eps); over C, of every token. None: none.
        norm_weight: (C,), multiplies the normalised token; absent: 1. Only with a norm.
        norm_bias: (C,), added to the normalised and weighted token; absent: 0. Only with a norm.
        eps: see norm.
        out_dtype: of the result; None = that of xs. The arithmetic between is float32.

    Returns:
        (B, Σ L_i, C), contiguous.

    Under autocast, tensors of different dtypes are promoted to the widest, as ``torch.cat`` does.

    Example:
        >>> text, image = torch.randn(2, 40, 768), torch.randn(2, 196, 768)
        >>> concat_tokens([text, image], type_embedding=torch.randn(2, 768), norm="layer").shape
        torch.Size([2, 236, 768])
    """
    if may_use_door() and isinstance(xs, (list, tuple)) and isinstance(position_embeddings, (list, tuple, type(None))):
        places = position_embeddings or ()
        sources = [i for i, p in enumerate(places) if p is not None]
        present = [p for p in places if p is not None]
        if len(places) in (0, len(xs)):
            args = (xs, type_embedding, present, sources, norm, norm_weight, norm_bias, eps, out_dtype)
            if (result := concat_tokens_op.unchecked(*args)) is not None:
                return result
    if is_overridden(xs, type_embedding, position_embeddings, norm_weight, norm_bias):
        return overridden_call(concat_tokens, locals())
    if not isinstance(xs, (list, tuple)):
        raise checks.type_error(_NAME, "xs", "a list of tensors", type(xs).__name__)
    if len(xs) == 0:
        raise checks.value_error(_NAME, "xs", "at least one tensor", "none")
    xs = list(xs)
    for i, x in enumerate(xs):
        checks.check_tensor(_NAME, f"xs[{i}]", x)
        if x.dim() != 3:
            raise checks.value_error(_NAME, f"xs[{i}]", "3 dims (B, L, C)", f"shape {tuple(x.shape)}")
    positions = _check_position_list(position_embeddings, len(xs))
    sources = [i for i, p in enumerate(positions) if p is not None]
    present = [p for p in positions if p is not None]
    if type_embedding is not None:
        checks.check_tensor(_NAME, "type_embedding", type_embedding)
    if checks.autocast_is_on(xs[0].device):
        *both, type_embedding, norm_weight, norm_bias = checks.autocast_promoted(
            *xs, *present, type_embedding, norm_weight, norm_bias
        )
        xs, present = both[: len(xs)], both[len(xs) :]
    first = xs[0]
    if first.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "xs[0]", "dtype float32, bfloat16, float16 or float64", first.dtype)
    batch, _, features = first.shape
    for i, x in enumerate(xs):
        checks.check_same_kind(_NAME, first, "xs[0]", **{f"xs[{i}]": x})
        if x.shape[0] != batch or x.shape[2] != features:
            raise checks.value_error(_NAME, f"xs[{i}]", f"shape ({batch}, L, {features})", tuple(x.shape))
    if type_embedding is not None:
        checks.check_same_kind(_NAME, first, "xs[0]", type_embedding=type_embedding)
        if type_embedding.shape != (len(xs), features):
            expected = f"shape ({len(xs)}, {features})"
            raise checks.value_error(_NAME, "type_embedding", expected, tuple(type_embedding.shape))
    for i, position in zip(sources, present, strict=True):
        argument = f"position_embeddings[{i}]"
        checks.check_same_kind(_NAME, first, "xs[0]", **{argument: position})
        if position.shape != (xs[i].shape[1], features):
            raise checks.value_error(_NAME, argument, f"shape ({xs[i].shape[1]}, {features})", tuple(position.shape))
    eps = check_norm(_NAME, norm, norm_weight, norm_bias, eps, features, first)
    if out_dtype is not None and out_dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "out_dtype", "float32, bfloat16, float16 or float64", out_dtype)
    (out,) = concat_tokens_op(xs, type_embedding, present, sources, norm, norm_weight, norm_bias, float(eps), out_dtype)
    return out


def _check_position_list(positions: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    """One entry per modality."""
    if positions is None:
        return [None] * count
    if not isinstance(positions, (list, tuple)):
        raise checks.type_error(
            _NAME, "position_embeddings", "a list with a tensor or None per modality", type(positions).__name__
        )
    if len(positions) != count:
        raise checks.value_error(_NAME, "position_embeddings", f"{count} entries, one per modality", len(positions))
    for i, position in enumerate(positions):
        if position is not None:
            checks.check_tensor(_NAME, f"position_embeddings[{i}]", position)
    return positions
