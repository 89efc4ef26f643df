"""Seconds that survive a busy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

Clock = Callable[[], float]

# Bytes of a working set whose rate is measured: caches of any machine hold the first and none the last.
WORKING_SETS = tuple(mib << 20 for mib in (4, 16, 64, 256))
GPU_WORKING_SETS = tuple(mib << 20 for mib in (16, 128, 1024, 4096))


def clock(threads: int, device: str = "cpu") -> Clock:
    """CPU time of the calling thread when it does all the work: a busy neighbour does not count. Else wall time, on a
    GPU when it has done all that it was given."""
    if device == "cpu":
        return time.thread_time if threads == 1 else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def in_rounds(
    contenders: Mapping[str, Callable[[], object]], now: Clock, budget: float, min_rounds: int = 3, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender's calls, in ascending order. They run in turn, so that a change of clock speed or a
    busy moment meets all of them alike. ``calls`` that follow each other are timed together, so that a GPU's queue does
    not run empty between them."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    start, rounds = time.perf_counter(), 0
    while rounds < min_rounds or time.perf_counter() - start < budget:
        for name, run in contenders.items():
            begin = now()
            for _ in range(calls):
                run()
            samples[name].append((now() - begin) / calls)
        rounds += 1
    return {name: sorted(taken) for name, taken in samples.items()}


def interleaved(
    contenders: Mapping[str, Callable[[], object]], now: Clock, budget: float, min_rounds: int = 3, calls: int = 1
) -> dict[str, float]:
    """Lower-quartile seconds of each contender: robust against a busy machine and a cold first round."""
    return lower_quartiles(in_rounds(contenders, now, budget, min_rounds, calls))


def lower_quartiles(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of samples in ascending order."""
    return {name: taken[len(taken) // 4] for name, taken in samples.items()}


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """Of samples in ascending order, the least that `percent` % of them do not exceed; None where they are too few for
    one to lie beyond it."""
    if len(samples) * (100 - percent) < 100:
        return None
    return samples[-(-len(samples) * percent // 100) - 1]


def shortest(run: Callable[[], object], now: Clock, budget: float) -> float:
    """The least seconds of as many calls as fit in the budget: what a ceiling is made of."""
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < budget:
        begin = now()
        run()
        best = min(best, now() - begin)
    return max(best, 1e-9)


def gemm_rate(dtype: torch.dtype, now: Clock, n: int = 1024, budget: float = 1.0) -> float:
    """FLOP/s of a plain n x n x n product."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2.0 * n**3 / shortest(lambda: torch.mm(a, b), now, budget)


def memory_rates(now: Clock, sizes: Sequence[int] = WORKING_SETS, budget: float = 0.3) -> dict[int, float]:
    """Bytes/s by working set: the better of a copy between its halves, read and written, and a sum over all of it."""
    rates = {}
    for size in sizes:
        both = torch.ones(2, size // 8)
        copy = shortest(partial(both[0].copy_, both[1]), now, budget / 2)
        rates[size] = size / min(copy, shortest(both.sum, now, budget / 2))
    return rates
