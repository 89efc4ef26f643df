"""Inputs with any leading dims as matrices, for ops whose kernels take rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(*, K) as (rows, K); a view wherever the leading dims allow one."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def from_rows(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """(rows, N) as (*, N)."""
    return rows if len(lead) == 1 else rows.view(*lead, rows.shape[-1])


def gradients_where_present(grads: Sequence[Tensor], presence: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Gradients (rows, K_i) of the modalities, those that are needed zero where presence (rows, M) or (M,) is False."""
    if presence is None:
        return list(grads)
    return [
        torch.where(presence[..., i : i + 1], grad, torch.zeros_like(grad)) if n else grad
        for i, (grad, n) in enumerate(zip(grads, needed, strict=True))
    ]
