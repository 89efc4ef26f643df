"""Differentiable collectives over the rows of a spread batch.

Every rank's backward comes to the same collectives in the same order, as every rank has the same graph: `Batch` checks
that the ranks agree on what needs a gradient. Gradients are summed over the ranks in float32 (float64 for float64).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.ops import _checks as checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_group(op: str, argument: str, group: object) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise checks.type_error(op, argument, "a torch.distributed.ProcessGroup or None", type(group).__name__)
    if dist.get_rank(group) < 0:
        raise checks.value_error(op, argument, "one that this process belongs to", "one that it does not belong to")


@contextlib.contextmanager
def answers_of_ranks(op: str) -> Iterator[None]:
    """Around collectives and their waits: the error of a rank that died or does not come names the op."""
    try:
        yield
    except RuntimeError as error:  # torch's own classes of them derive from it
        raise RuntimeError(f"{op}: group: expected every rank to take part in time; got {error}") from error


def told_by_ranks(
    op: str, group: Any, device: torch.device, counts: Sequence[int], facts: Sequence[tuple[str, int]]
) -> list[list[int]]:
    """The counts of each rank, once all are seen to agree on the facts; every rank gives as many."""
    mine = torch.tensor([*counts, *(fact for _, fact in facts)], dtype=torch.int64, device=device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    with answers_of_ranks(op):
        dist.all_gather(of_ranks, mine, group=group)
        table = torch.stack(of_ranks).tolist()
    for i, (name, _) in enumerate(facts, len(counts)):
        if len({row[i] for row in table}) > 1:
            raise checks.value_error(op, "group", f"ranks that agree on their {name}", [row[i] for row in table])
    return [row[: len(counts)] for row in table]


class Batch:
    """How the rows of a global batch lie on the ranks of a group.

    Args:
        op: for messages.
        rows: any tensor [n, D] with this rank's rows; n may differ from rank to rank, and be 0.
        tensors: all tensors that gradients may be wanted of, and None.
        group: of ranks that make this same call.
    """

    def __init__(self, op: str, rows: Tensor, tensors: Sequence[Tensor | None], group: Any) -> None:
        check_group(op, "group", group)
        self.op = op
        self.group = group
        self.rank = dist.get_rank(group)
        wants = torch.is_grad_enabled()
        # 0 for an absent tensor, 1 for one without a gradient, 2 with one.
        kinds = [0 if t is None else 2 if wants and t.requires_grad else 1 for t in tensors]
        facts = [("features", rows.shape[1]), ("dtype", DTYPES.index(rows.dtype))]
        facts += [("tensors that are given and that require gradients", kind) for kind in kinds]
        table = told_by_ranks(op, group, rows.device, [rows.shape[0]], facts)
        self.counts = [row[0] for row in table]

    @property
    def first(self) -> int:
        """The index of this rank's first row in the global batch."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def gather(self, x: Tensor) -> Tensor:
        """[n, …] of each rank -> [N, …], rank after rank; the gradient of its own rows flows back to each."""
        gathered: Tensor = _Gather.apply(x, self)
        return gathered

    def shared(self, parameter: Tensor) -> Tensor:
        """A tensor that every rank has a copy of: its gradient is the sum of all ranks' gradients."""
        same: Tensor = _Shared.apply(parameter, self)
        return same

    def sum(self, part: Tensor) -> Tensor:
        """The sum of the ranks' parts, on each; its gradient goes to this rank's own part."""
        total: Tensor = _Sum.apply(part, self)
        return total


def _summed(x: Tensor, batch: Batch) -> Tensor:
    """The ranks' tensors added up, in at least float32."""
    total = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    with answers_of_ranks(batch.op):
        dist.all_reduce(total, group=batch.group)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch, ctx.dtype = batch, x.dtype
        padded = x.new_zeros((max(batch.counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in batch.counts]
        if padded.numel():
            with answers_of_ranks(batch.op):
                dist.all_gather(parts, padded, group=batch.group)
        return torch.cat([part[:count] for part, count in zip(parts, batch.counts, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch = ctx.batch
        own = _summed(grad, batch)[batch.first : batch.first + batch.counts[batch.rank]]
        return own.to(ctx.dtype), None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, batch: Batch) -> Tensor:
        ctx.batch, ctx.dtype = batch, parameter.dtype
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.batch).to(ctx.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, batch: Batch) -> Tensor:
        return _summed(part, batch).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
