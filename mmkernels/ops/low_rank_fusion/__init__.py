"""Tensor fusion with a weight of low rank: products of projections instead of an outer product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._rows import as_rows, from_rows
from mmkernels.ops.low_rank_fusion.op import low_rank_fusion_op

__all__ = ["low_rank_fusion"]


def low_rank_fusion(
    xs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weights: Tensor,
    bias: Tensor | None = None,
    *,
    presence: Tensor | None = None,
) -> Tensor:
    """Low-rank multimodal fusion; no projection of a modality is stored, forward or backward.

        y = Σ_r w_r Π_i ([1; x_i] F_i[r]) + b

    It equals `tensor_fusion_linear` with the weight Σ_r w_r ⊗_i F_i[r]. Liu et al., "Efficient Low-rank Multimodal
    Fusion with Modality-Specific Factors", 2018 (arXiv:1806.00064).

    Args:
        xs: M ≥ 1 tensors (*, D_i) with the same leading shape, float32, bfloat16, float16, or float64 (reference
            backend alone). Any widths, 0 included. Any strides; a last dim that is not contiguous costs a copy of that
            tensor.
        factors: M tensors (R, D_i + 1, N); row 0 of a factor multiplies the 1.
        rank_weights: (R,) or (1, R).
        bias: (N,) or (1, N).
        presence: (*, M) or (M,) bool, True where a modality was observed. An absent one counts as zeros, whatever it
            holds, and its gradient is zero; its appended 1 stays.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, N).

    Example:
        >>> xs = [torch.randn(8, 32), torch.randn(8, 16)]
        >>> factors = [torch.randn(4, 33, 64), torch.randn(4, 17, 64)]
        >>> low_rank_fusion(xs, factors, torch.randn(4), torch.zeros(64)).shape
        torch.Size([8, 64])
    """
    if may_use_door():
        plain = low_rank_fusion_op.unchecked(xs, factors, rank_weights, bias, presence)
        if plain is not None:
            return plain
    if is_overridden(xs, factors, rank_weights, bias, presence):
        return overridden_call(low_rank_fusion, locals())
    name = "low_rank_fusion"
    first = fusion.first_source(name, xs)
    if checks.autocast_is_on(first.device):
        xs, factors, rank_weights, bias = fusion.autocast(first.device, xs, factors, rank_weights, bias)
        first = xs[0]
    lead, _ = fusion.check_sources(name, xs)
    rank, outputs = _check_factors(name, factors, xs)
    rank_weights = _check_row(name, "rank_weights", rank_weights, rank, first)
    if bias is not None:
        bias = _check_row(name, "bias", bias, outputs, first)
    if presence is not None:
        presence = fusion.row_presence(name, presence, lead, len(xs), first)
    rows = [as_rows(x) for x in xs]
    return from_rows(low_rank_fusion_op(rows, list(factors), rank_weights, bias, presence)[0], lead)


def _check_factors(op: str, factors: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[int, int]:
    """R and N, which all factors share."""
    if not isinstance(factors, (list, tuple)):
        raise checks.type_error(op, "factors", "a list of tensors", type(factors).__name__)
    if len(factors) != len(xs):
        raise checks.value_error(op, "factors", f"one per modality, {len(xs)}", len(factors))
    rank: int | str = "R"
    outputs: int | str = "N"
    for i, (factor, x) in enumerate(zip(factors, xs, strict=True)):
        argument = f"factors[{i}]"
        if not isinstance(factor, Tensor) or factor.dtype != xs[0].dtype or factor.device != xs[0].device:
            checks.check_tensor(op, argument, factor)
            fusion.check_kind(op, argument, factor, xs[0])
        if i == 0 and factor.dim() == 3:
            rank, _, outputs = factor.shape
        shape = (rank, x.shape[-1] + 1, outputs)
        if factor.shape != shape:
            raise checks.value_error(op, argument, f"shape {fusion.shape_text(shape)}", tuple(factor.shape))
    assert not isinstance(rank, str) and not isinstance(outputs, str)
    return rank, outputs


def _check_row(op: str, argument: str, value: Tensor, size: int, first: Tensor) -> Tensor:
    """``value``, of shape (size,) or (1, size), as (size,)."""
    if not isinstance(value, Tensor) or value.dtype != first.dtype or value.device != first.device:
        checks.check_tensor(op, argument, value)
        fusion.check_kind(op, argument, value, first)
    if not fusion.has_shape(value, (size,)) and not fusion.has_shape(value, (1, size)):
        raise checks.value_error(op, argument, f"shape {(size,)} or {(1, size)}", tuple(value.shape))
    return value if value.dim() == 1 else value.squeeze(0)
