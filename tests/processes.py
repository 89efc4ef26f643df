"""Tests of several processes: each is a rank of a gloo group on this machine.

A script ``tests/<name>.py`` ends with ``take_part(work)``; a test starts as many of it as there are ranks, and gets
what each of their ``work(rank, ranks)`` returned.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from environment import DEVICE

import mmkernels as mmk

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or DEVICE != "cpu",
    reason="the processes meet by gloo, on the CPU",
)


def environment_of_ranks() -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(mmk.__file__).parents[1])}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def results_of_ranks(script: str, ranks: int, folder: Path, *arguments: str, seconds: float = 240) -> list[Any]:
    """What each rank returned; all of them are gone when the time is over."""
    path = Path(__file__).with_name(script)
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), str(rank), str(ranks), str(folder), *arguments],
            env=environment_of_ranks(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def take_part(work: Callable[..., Any], timeout: float = 60, to_the_end: bool = True) -> None:
    """Be the rank that the command line says, and leave what ``work(rank, ranks, *arguments)`` returns.

    ``to_the_end``: the ranks wait for one another before they go.
    """
    rank, ranks, folder, arguments = _command_line()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(work(rank, ranks, *arguments), folder / f"rank{rank}.pt")
    if to_the_end:
        dist.barrier()
        dist.destroy_process_group()


def _command_line() -> tuple[int, int, Path, Sequence[str]]:
    _, rank, ranks, folder, *arguments = sys.argv
    return int(rank), int(ranks), Path(folder), arguments
