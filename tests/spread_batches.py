"""One rank of a batch that is spread over processes: makes every case's call on its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from processes import take_part
from torch import Tensor

import mmkernels as mmk
from mmkernels.distributed import contrastive as spread
from mmkernels.distributed.parts import GATHERED_BYTES

COUNTS = {2: (24, 13), 4: (11, 0, 20, 6)}  # rows of each rank
PAIRS, FEATURES = 37, 19


@dataclass(frozen=True)
class Case:
    """One call of a contrastive loss."""

    sigmoid: bool = False
    dtype: torch.dtype = torch.float32
    labels: bool = False
    smoothing: float = 0.0
    is_log_scale: bool = False
    ring: bool = False

    def leaves(self) -> list[Tensor]:
        """x, y, scale and for the sigmoid bias, of the whole batch."""
        generator = torch.Generator().manual_seed(3)
        x, y = (F.normalize(torch.randn(PAIRS, FEATURES, generator=generator), dim=-1).to(self.dtype) for _ in range(2))
        wide = torch.promote_types(self.dtype, torch.float32)
        scale = torch.tensor(2.5 if self.is_log_scale else 12.0, dtype=wide)
        return [x, y, scale, torch.tensor(-4.0, dtype=wide)][: 4 if self.sigmoid else 3]

    def loss(self, leaves: list[Tensor], rows: slice, group: Any = None) -> Tensor:
        options: dict[str, Any] = {"group": group, "is_log_scale": self.is_log_scale}
        if self.sigmoid:
            return mmk.sigmoid_contrastive_loss(*leaves, **options)
        labels = (torch.arange(PAIRS) * 7 % 11)[rows] if self.labels else None
        return mmk.contrastive_loss(*leaves, labels=labels, label_smoothing=self.smoothing, **options)

    def results(self, rows: slice = slice(None), group: Any = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The loss, and the gradients of 1.5 times it."""
        x, y, *scalars = (t.to(dtype or t.dtype) for t in self.leaves())
        leaves = [t.clone().requires_grad_() for t in (x[rows], y[rows], *scalars)]
        spread.GATHERED_BYTES = 0 if self.ring else GATHERED_BYTES
        loss = self.loss(leaves, rows, group)
        return [loss.detach(), *torch.autograd.grad(1.5 * loss, leaves)]


CASES = {
    "contrastive": Case(),
    "contrastive, logarithm of the scale": Case(is_log_scale=True),
    "contrastive, labels": Case(labels=True),
    "contrastive, smoothed": Case(smoothing=0.2),
    "contrastive, labels, smoothed, float64": Case(labels=True, smoothing=0.1, dtype=torch.float64),
    "contrastive, bfloat16": Case(dtype=torch.bfloat16),
    "sigmoid": Case(sigmoid=True),
    "sigmoid, logarithm of the scale, float64": Case(sigmoid=True, is_log_scale=True, dtype=torch.float64),
    "sigmoid, float16": Case(sigmoid=True, dtype=torch.float16),
    "sigmoid around the ring": Case(sigmoid=True, ring=True),
    "sigmoid around the ring, bfloat16": Case(sigmoid=True, ring=True, dtype=torch.bfloat16),
    "sigmoid around the ring, logarithm of the scale, float64": Case(
        sigmoid=True, ring=True, is_log_scale=True, dtype=torch.float64
    ),
}


def rows_of(rank: int, ranks: int) -> slice:
    first = sum(COUNTS[ranks][:rank])
    return slice(first, first + COUNTS[ranks][rank])


def messages(rank: int, rows: slice) -> list[str]:
    """What is said where the ranks do not ask for the same."""
    found = []
    x, y, scale = Case().leaves()
    ways = {
        "labels": dict(labels=torch.zeros(PAIRS, dtype=torch.long)[rows] if rank == 0 else None),
        "gradients": dict(),
        "features": dict(),
    }
    for way, options in ways.items():
        left = x[rows, : FEATURES - (way == "features" and rank == 0)]
        right = y[rows, : left.shape[1]].clone().requires_grad_(way == "gradients" and rank == 0)
        try:
            mmk.contrastive_loss(left, right, scale, group=torch.distributed.group.WORLD, **options)
        except ValueError as error:
            found.append(str(error))
    return found


def work(rank: int, ranks: int) -> dict[str, Any]:
    rows, world = rows_of(rank, ranks), torch.distributed.group.WORLD
    found = {name: case.results(rows, world) for name, case in CASES.items()}
    return {"results": found, "messages": messages(rank, rows)}


if __name__ == "__main__":
    take_part(work)
