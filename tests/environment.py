"""What the environment asks of the tests; imported before mmkernels and triton read it for themselves.

- ``MMKERNELS_TEST_DEVICE=cuda``: the tests' tensors are on the GPU. Else Triton's kernels run in its interpreter.
- ``MMKERNELS_BACKEND=triton``: the ordinary tests, where they choose a backend, on Triton alone. It is not forced on
  all else, since a float64 oracle is beyond it.
"""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("MMKERNELS_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    torch.set_default_device(DEVICE)
if os.environ.get("MMKERNELS_BACKEND") == "triton":
    del os.environ["MMKERNELS_BACKEND"]
    os.environ["MMKERNELS_TEST_BACKEND"] = "triton"  # for the processes that pytest starts
TRITON_ALONE = os.environ.get("MMKERNELS_TEST_BACKEND") == "triton"
HERE = str(torch.empty(0).device)  # as errors name it: cpu, cuda:0
