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
    """Buffers on their way to other ranks, each with its rank, and such that come from others."""

    def __init__(
        self, op: str, group: Any, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]
    ) -> None:
        self._op = op
        self._sent = sent  # alive until they have left
        ways = ((dist.isend, sent), (dist.irecv, received))
        messages = [
            dist.P2POp(way, buffer, dist.get_global_rank(group, rank), group)
            for way, buffers in ways
            for buffer, rank in buffers
            if buffer.numel()
        ]
        with answers_of_ranks(op):
            self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> None:
        with answers_of_ranks(self._op):
            for work in self._works:
                work.wait()


class Ring:
    """Parts go from rank to rank; in step s rank r has that of rank r − s, if it goes so far.

    Args:
        op: for messages.
        group: of at least two ranks.
        sizes: elements of each rank's part.
        reaches: for each part the last step in which a rank computes with it; else it goes around.
    """

    def __init__(self, op: str, group: Any, sizes: Sequence[int], reaches: Sequence[int] | None = None) -> None:
        self._op, self._group, self._sizes = op, group, sizes
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._reaches = [self._ranks - 1] * self._ranks if reaches is None else reaches
        self._step = 0
        self._following: Tensor | None = None  # the sum of the part of the next step
        self._home: Tensor | None = None
        self._passing: _Passing | None = None  # of sums

    def _neighbours(self) -> tuple[int, int]:
        return (self._rank + 1) % self._ranks, (self._rank - 1) % self._ranks

    def parts(self, own: Tensor) -> Iterator[dict[int, Tensor]]:
        """The parts by their ranks, one at a time; none in a step whose part does not come so far."""
        held: Tensor | None = own
        after, before = self._neighbours()
        for step in range(max(self._reaches) + 1):
            source = (self._rank - step) % self._ranks
            coming = None
            if step < self._reaches[source - 1]:
                coming = own.new_empty(self._sizes[source - 1])
            sent = [(held, after)] if held is not None and step < self._reaches[source] else []
            received = [] if coming is None else [(coming, before)]
            passing = _Passing(self._op, self._group, sent, received)
            self._step = step
            yield {} if held is None else {source: held}
            passing.wait()
            held = coming

    def add(self, sums: dict[int, Tensor]) -> None:
        """What this rank has to add for the owner of the part that it was just given; every rank in every step.

        A sum follows its part to the last rank that computes with it, and goes home from there.
        """
        step, source = self._step, (self._rank - self._step) % self._ranks
        if self._passing is not None:
            self._passing.wait()
        after, before = self._neighbours()
        sent, received = [], []
        coming = None
        for total in sums.values():
            if self._following is not None:
                total = self._following.add_(total)
            if step < self._reaches[source]:
                sent.append((total, after))
            elif step > 0:
                sent.append((total, source))
            else:
                self._home = total
            self._kind = total.new_empty(0)
        if step < self._reaches[source - 1]:
            coming = self._kind.new_empty(self._sizes[source - 1])
            received.append((coming, before))
        if 0 < step == self._reaches[self._rank]:
            self._home = self._kind.new_empty(self._sizes[self._rank])
            received.append((self._home, (self._rank + step) % self._ranks))
        self._following = coming
        self._passing = _Passing(self._op, self._group, sent, received)

    def own_sum(self) -> Tensor:
        assert self._home is not None and self._passing is not None
        self._passing.wait()
        return self._home


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
