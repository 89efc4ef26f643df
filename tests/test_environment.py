"""What the other tests rely on."""

from __future__ import annotations

import platform

import pytest
import torch
from environment import DEVICE


@pytest.mark.skipif(DEVICE != "cpu" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize("count", [3, 1000, 10_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fresh_memory_is_full_of_nan(dtype: torch.dtype, count: int) -> None:
    assert torch.empty(count, dtype=dtype).isnan().all()
