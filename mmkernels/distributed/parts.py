"""The parts of tensors that are spread over the ranks, as they come by: around a ring, or all at once.

A part is a flat buffer of all that a rank holds. Around the ring each rank computes with one part while the next is on
its way; sums for a part's owner follow it, one step behind. At once costs the memory of all parts and one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.distributed.collectives import answers_of_ranks

GATHERED_BYTES = 16 << 20  # up to here the latency of R − 1 messages costs more than the memory of all parts

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before


class _Passing:
    """A buffer on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, op: str, group: Any, buffer: Tensor, size: int) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
        self._op = op
        self._sent = buffer  # alive until it has left
        self._received = buffer.new_empty(size)
        messages = []
        if buffer.numel():
            messages.append(dist.P2POp(dist.isend, buffer, after, group))
        if size:
            messages.append(dist.P2POp(dist.irecv, self._received, before, group))
        with answers_of_ranks(op):
            self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Tensor:
        with answers_of_ranks(self._op):
            for work in self._works:
                work.wait()
        return self._received


class Ring:
    """Parts go from rank to rank; in step s rank r has that of rank r − s.

    Args:
        op: for messages.
        group: of at least two ranks.
        sizes: elements of each rank's part.
    """

    def __init__(self, op: str, group: Any, sizes: Sequence[int]) -> None:
        self._op, self._group, self._sizes = op, group, sizes
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._following: _Passing | None = None

    def parts(self, own: Tensor) -> Iterator[dict[int, Tensor]]:
        """The parts by their ranks, one at a time."""
        held = own
        for step in range(self._ranks):
            source = (self._rank - step) % self._ranks
            coming = None
            if step + 1 < self._ranks:
                coming = _Passing(self._op, self._group, held, self._sizes[source - 1])
            yield {source: held}
            if coming is not None:
                held = coming.wait()

    def add(self, sums: dict[int, Tensor]) -> None:
        """What this rank has to add for the owners of the parts that it was just given."""
        ((source, total),) = sums.items()
        if self._following is not None:
            total = self._following.wait().add_(total)
        self._following = _Passing(self._op, self._group, total, self._sizes[source - 1])

    def own_sum(self) -> Tensor:
        assert self._following is not None
        return self._following.wait()


class AllAtOnce:
    """Every part is gathered, by groups of ``together`` ranks; as `Ring`, also for a group of one rank."""

    def __init__(self, op: str, group: Any, sizes: Sequence[int], together: int) -> None:
        self._op, self._group, self._sizes, self._together = op, group, sizes, together
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._sums: Tensor | None = None  # [R, largest]

    def parts(self, own: Tensor) -> Iterator[dict[int, Tensor]]:
        parts = [own]
        if self._ranks > 1:
            padded = own.new_zeros(max(self._sizes))
            padded[: own.numel()] = own
            parts = [torch.empty_like(padded) for _ in self._sizes]
            with answers_of_ranks(self._op):
                dist.all_gather(parts, padded, group=self._group)
        for first in range(0, self._ranks, self._together):
            sources = range(first, min(first + self._together, self._ranks))
            yield {source: parts[source][: self._sizes[source]] for source in sources}

    def add(self, sums: dict[int, Tensor]) -> None:
        for source, total in sums.items():
            if self._sums is None:
                self._sums = total.new_zeros((self._ranks, max(self._sizes)))
            self._sums[source, : total.numel()] += total

    def own_sum(self) -> Tensor:
        assert self._sums is not None
        own = self._sums[0]
        if self._ranks > 1:
            own = torch.empty_like(own)
            with answers_of_ranks(self._op):
                _reduce_scatter(own, self._sums.view(-1), group=self._group)
        return own[: self._sizes[self._rank]]
