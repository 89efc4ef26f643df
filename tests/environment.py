"""What the environment asks of the tests; imported before mmkernels and triton read it for themselves.

- ``MMKERNELS_TEST_DEVICE=cuda``: the tests' tensors are on the GPU. Else Triton's kernels run in its interpreter.
- ``MMKERNELS_BACKEND=triton``, ``cuda`` or ``simt``: the ordinary tests, where they choose a backend, on Triton's
  kernels alone, or on those in CUDA C++, on a GPU or in the emulator. It is not forced on all else, since a float64
  oracle is beyond them.

Where the C library is glibc, fresh memory is full of NaN: what reads it before it was written fails every time.
"""

from __future__ import annotations

import ctypes
import os

import torch

DEVICE = os.environ.get("MMKERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    torch.set_default_device(DEVICE)
if os.environ.get("MMKERNELS_BACKEND") in ("triton", "cuda", "simt"):
    os.environ["MMKERNELS_TEST_BACKEND"] = os.environ.pop("MMKERNELS_BACKEND")  # for the processes that pytest starts
ALONE = os.environ.get("MMKERNELS_TEST_BACKEND")  # the backend that the tests are for, or None
HERE = str(torch.empty(0).device)  # as errors name it: cpu, cuda:0


def fill_fresh_memory() -> None:
    """Have glibc set every byte that it hands out to 255, NaN in floating dtypes, and kernels ask it every time."""
    os.environ["MMKERNELS_KEEP_SCRATCH"] = "0"
    m_perturb, of_all_bits = -6, 256  # bytes are of_all_bits ^ 255
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(m_perturb, of_all_bits)


fill_fresh_memory()
