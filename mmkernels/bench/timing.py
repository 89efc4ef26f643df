"""Seconds that survive a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]


def clock(threads: int) -> Clock:
    """CPU time of the calling thread when it does all the work: a busy neighbour does not count. Else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def interleaved(
    contenders: Mapping[str, Callable[[], object]], now: Clock, budget: float, min_rounds: int = 3
) -> dict[str, float]:
    """Lower-quartile seconds of each contender. They run in turn, so that a change of clock speed or a busy moment
    meets all of them alike; the quartile is robust against the rest, a cold first round included."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds < min_rounds or time.perf_counter() - start < budget:
        for name, run in contenders.items():
            begin = now()
            run()
            samples[name].append(now() - begin)
        rounds += 1
    return {name: sorted(taken)[len(taken) // 4] for name, taken in samples.items()}


def gemm_rate(dtype: torch.dtype, now: Clock, n: int = 1024, budget: float = 1.0) -> float:
    """FLOP/s of a plain n x n x n product: the best of what fits in the budget, since it serves as a ceiling."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best, start, rounds = float("inf"), time.perf_counter(), 0
    while rounds < 1 or time.perf_counter() - start < budget:
        begin = now()
        torch.mm(a, b)
        best, rounds = min(best, now() - begin), rounds + 1
    return 2.0 * n**3 / best
