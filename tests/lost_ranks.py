"""One rank of calls that the last rank does not come to: it waits elsewhere, or is gone."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from processes import take_part
from torch.distributed.distributed_c10d import _set_pg_timeout

import mmkernels as mmk
from mmkernels.distributed import context_parallel_attention

TIMEOUT = timedelta(seconds=4)  # of the calls alone: on a busy machine the ranks take longer to meet


def work(rank: int, ranks: int, absence: str, signals: str) -> dict[str, str]:
    if rank == ranks - 1:
        others = [Path(signals) / str(other) for other in range(ranks - 1)]
        until = time.monotonic() + 100
        while absence == "late" and time.monotonic() < until and not all(other.exists() for other in others):
            time.sleep(0.1)
        return {}
    _set_pg_timeout(TIMEOUT, dist.group.WORLD)
    x = torch.randn(1, 2, 6, 8)
    calls = {
        "attention": lambda: context_parallel_attention(x, x, x, dist.group.WORLD),
        "loss": lambda: mmk.contrastive_loss(x[0, 0], x[0, 1], 2.0, group=dist.group.WORLD),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            said[name] = str(error)
    (Path(signals) / str(rank)).touch()
    return said


if __name__ == "__main__":
    take_part(work, to_the_end=False)
