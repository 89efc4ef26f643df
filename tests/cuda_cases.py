"""What the tests of CUDA kernels share: dtypes; in the emulator the order in which threads run, and what it counts."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from environment import DEVICE

from mmkernels import _cuda

HALVES = [pytest.param(t, id=str(t)[6:]) for t in (torch.bfloat16, torch.float16)]
each_half = pytest.mark.parametrize("dtype", HALVES)

emulator_only = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not count what it does")

COUNTS = ("blocks", "barriers", "collectives", "mma", "matrix_loads", "bank_conflicts", "copies")


@functools.cache
def library() -> ctypes.CDLL:
    assert _cuda.simt_status() is None
    return ctypes.CDLL(str(_cuda.SIMT.path))


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Run warps and lanes in an order that the seed chooses; a GPU chooses for itself."""
    if DEVICE != "cpu":
        yield
        return
    library().mmk_simt_set_seed(ctypes.c_uint64(seed))
    try:
        yield
    finally:
        library().mmk_simt_set_seed(ctypes.c_uint64(0))


def take_counts() -> dict[str, int]:
    """What the emulator counted since the last call."""
    counts = (ctypes.c_uint64 * len(COUNTS))()
    library().mmk_simt_take_statistics(counts)
    return dict(zip(COUNTS, counts, strict=True))


some_schedules = pytest.mark.usefixtures("any_schedule")  # of conftest.py
