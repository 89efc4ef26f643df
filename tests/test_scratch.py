"""The memory of one call is kept for the next: page faults are counted, as glibc is told to give all that is large back
to the system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from conftest import native_only

CALLS = """
import ctypes, resource, torch, mmkernels as mmk
ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
torch.set_num_threads(1)
xs, weight = [torch.randn(16, n) for n in (300, 74, 35)], torch.randn(256, 409)
for calls in (10, 100):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        mmk.concat_linear(xs, weight)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@native_only
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator alone is told so")
@pytest.mark.parametrize("keep", ["1", "0"])
def test_a_call_has_the_memory_of_the_last_one(keep: str) -> None:
    environment = {**os.environ, "MMKERNELS_KEEP_SCRATCH": keep}
    done = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    faults = int(done.stdout)
    assert faults < 100 if keep == "1" else faults > 1000, faults
