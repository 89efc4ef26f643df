"""What the environment asks of the tests; imported before mmkernels and triton read it for themselves.

Without a GPU Triton's kernels run in its interpreter. ``MMKERNELS_BACKEND=triton`` means the ordinary tests, where they
choose a backend, on Triton alone; it is not forced on all else, since a float64 oracle is beyond it.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON_ALONE = os.environ.get("MMKERNELS_BACKEND") == "triton"
if TRITON_ALONE:
    del os.environ["MMKERNELS_BACKEND"]
