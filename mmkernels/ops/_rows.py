"""Inputs with any leading dims as matrices, for ops whose kernels take rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(*, K) as (rows, K); a view wherever the leading dims allow one."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def from_rows(rows: Tensor, lead: Sequence[int]) -> Tensor:
    """(rows, N) as (*, N)."""
    return rows if len(lead) == 1 else rows.view(*lead, rows.shape[-1])
