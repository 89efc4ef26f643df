"""Tests of several processes: each is a rank of a gloo group on this machine.

A script ``tests/<name>.py`` ends with ``take_part(work)``; a test starts it for a number of ranks, and gets what each
of their ``work(rank, ranks)`` returned.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
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


def results_of_ranks(script: str, ranks: int, folder: Path, *arguments: str) -> list[Any]:
    """What each rank returned; those that hang are killed."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), str(ranks), str(folder), *arguments],
        env=environment_of_ranks(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=1200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def worlds_of(script: str, counts: Iterable[int]) -> Any:
    """A module's fixture: number of ranks -> what each of them returned."""

    @pytest.fixture(scope="module")
    def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
        return {ranks: results_of_ranks(script, ranks, tmp_path_factory.mktemp(f"world{ranks}")) for ranks in counts}

    return worlds


def take_part(work: Callable[..., Any], to_the_end: bool = True) -> None:
    """Be the ranks that the command line asks for; each leaves what ``work(rank, ranks, *arguments)`` returns.

    They are forks of this process, so that what takes them longest, the imports, is done once.

    ``to_the_end``: the ranks wait for one another before they go.
    """
    _, ranks, folder, *arguments = sys.argv
    arguments_of_rank = (int(ranks), Path(folder), arguments, work, to_the_end)
    torch.multiprocessing.start_processes(_be, arguments_of_rank, nprocs=int(ranks), start_method="fork")


def _be(
    rank: int,
    ranks: int,
    folder: Path,
    arguments: Sequence[str],
    work: Callable[..., Any],
    to_the_end: bool,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    torch.save(work(rank, ranks, *arguments), folder / f"rank{rank}.pt")
    if to_the_end:
        dist.barrier()
        dist.destroy_process_group()
