"""What the attention pools share: their modalities, the masked softmax over them, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion

Modalities = Tensor | Sequence[Tensor]  # (B, M, D), or M of (B, D)


def as_sources(xs: Modalities) -> Sequence[Tensor] | None:
    """``xs`` as the ops take them: a list of one tensor (B, M, D), or of M tensors (B, D). None where the number of
    dims would not tell which of the two it is."""
    if isinstance(xs, Tensor):
        return [xs] if xs.dim() == 3 else None
    if not isinstance(xs, (list, tuple)) or not xs or not isinstance(xs[0], Tensor) or xs[0].dim() != 2:
        return None
    return xs


class PoolShape(NamedTuple):
    batch: int
    modalities: int
    width: int


def check_modalities(op: str, xs: Modalities) -> tuple[list[Tensor], PoolShape]:
    """The modalities as the ops take them, and their sizes."""
    if isinstance(xs, Tensor):
        _check_floating(op, "xs", xs)
        if xs.dim() != 3:
            raise checks.value_error(op, "xs", "shape (B, M, D), or a list of M tensors (B, D)", tuple(xs.shape))
        if xs.shape[1] == 0:
            raise checks.value_error(op, "xs", "at least one modality", tuple(xs.shape))
        return [xs], PoolShape(*xs.shape)
    first = fusion.first_source(op, xs)
    _check_floating(op, "xs[0]", first)
    if first.dim() != 2:
        raise checks.value_error(op, "xs[0]", "shape (B, D)", tuple(first.shape))
    for i, x in enumerate(xs):
        fusion.check_shaped(op, f"xs[{i}]", x, tuple(first.shape), first)
    return list(xs), PoolShape(first.shape[0], len(xs), first.shape[1])


def _check_floating(op: str, argument: str, x: Tensor) -> None:
    if x.dtype not in checks.FLOATING:
        raise checks.type_error(op, argument, "dtype float32, bfloat16, float16 or float64", x.dtype)


def check_query(op: str, query: Tensor, shape: PoolShape, first: Tensor) -> int:
    """Dq of a query (B, Dq)."""
    checks.check_tensor(op, "query", query)
    fusion.check_kind(op, "query", query, first)
    if query.dim() != 2 or query.shape[0] != shape.batch:
        raise checks.value_error(op, "query", f"shape {fusion.shape_text((shape.batch, 'Dq'))}", tuple(query.shape))
    return query.shape[1]


def autocast(xs: Modalities, *values: Any) -> tuple[Modalities, Sequence[Any]]:
    """All of them in autocast's dtype, where it is on."""
    first = xs[0] if isinstance(xs, (list, tuple)) and xs else xs
    if not isinstance(first, Tensor) or not checks.autocast_is_on(first.device):
        return xs, values
    cast, *others = fusion.autocast(first.device, xs, *values)
    return cast, others


def default_scale(sources: Any) -> float:
    """1/√D, as for scaled dot-product attention."""
    first = sources[0] if isinstance(sources, (list, tuple)) and sources else None
    width = first.shape[-1] if isinstance(first, Tensor) and first.dim() > 0 else 1
    return width**-0.5 if width != 0 else 1.0


def check_presence(op: str, presence: Tensor | None, shape: PoolShape, first: Tensor) -> None:
    if presence is not None:
        fusion.check_presence(op, presence, torch.Size((shape.batch,)), shape.modalities, first)


def stacked(xs: Sequence[Tensor], presence: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[B, M, D], zeros where a modality is absent, and [B, M, 1] or [M, 1], True there."""
    x = xs[0] if xs[0].dim() == 3 else torch.stack(list(xs), 1)
    if presence is None:
        return x, None
    absent = ~presence[..., None]
    return x.masked_fill(absent, 0), absent


def softmax_over_present(energies: Tensor, absent: Tensor | None) -> Tensor:
    """Softmax over the modalities, the second dim of [B, M, *]; 0 where one is absent."""
    if absent is None:
        return torch.softmax(energies, 1)
    absent = absent.expand((*energies.shape[:2], 1))
    none_present = absent.all(1, keepdim=True)  # any finite energies will do there
    weights = torch.softmax(energies.masked_fill(absent & ~none_present, -torch.inf), 1)
    return weights.masked_fill(absent, 0)


def pooled_fake(xs: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    """Pooled [B, D], and B and M."""
    first = xs[0]
    count = first.shape[1] if first.dim() == 3 else len(xs)
    return first.new_empty((first.shape[0], first.shape[-1])), first.shape[0], count


def too_many_modalities(xs: Sequence[Tensor]) -> str | None:
    """Why Triton's kernels do not serve a call, or None."""
    _pooled, _batch, count = pooled_fake(xs)
    return None if count <= 64 else f"{count} modalities are more than the 64 that a program takes"
