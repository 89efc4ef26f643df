"""The CUDA library: what its kernels take of a GPU, and that it loads where torch has no CUDA."""

from __future__ import annotations

import copy

import pytest
import torch

import mmkernels as mmk
from mmkernels import _cuda, _cuda_table
from mmkernels._dispatch import backend_status
from mmkernels.triton.table import DOCUMENT

pytestmark = pytest.mark.skipif(_cuda_table.absent() is not None, reason=str(_cuda_table.absent()))


@pytest.fixture(scope="module")
def kernels() -> _cuda_table.Table:
    return _cuda_table.table()


def test_the_kernels_are_within_budget(kernels: _cuda_table.Table) -> None:
    assert len(kernels) > 80
    assert _cuda_table.excesses(kernels, DOCUMENT.read_text()) == []


def test_products_use_tensor_cores_and_background_copies(kernels: _cuda_table.Table) -> None:
    for name, row in kernels.items():
        for architecture, figures in row.items():
            product = name.startswith(
                ("short_key_forward", "short_key_query", "short_key_gradients", "concat_linear_f")
            )
            assert bool(figures.dots) >= product and bool(figures.copies) >= product, (name, architecture)


def test_budgets_notice_what_got_worse(kernels: _cuda_table.Table) -> None:
    document = _cuda_table.render(kernels)
    assert _cuda_table.excesses(kernels, document) == []
    worse = copy.deepcopy(kernels)
    name = "short_key_forward<Bf16, 64>"
    figures = worse[name]["sm_90a"]
    figures.registers, figures.spills, figures.dots, figures.copies, figures.wide = 255, 3, 0, 0, 0
    del worse["short_key_forward<Bf16, 128>"], worse["short_key_forward<Bf16, 32>"]["sm_80"]
    wrong = "\n".join(_cuda_table.excesses(worse, document))
    for expected in (
        f"{name}, sm_90a: 3 spills",
        f"{name}, sm_90a: 255 registers, budget",
        f"{name}, sm_90a: no tensor-core instructions",
        f"{name}, sm_90a: no background copies",
        f"{name}, sm_90a: no accesses of 16 bytes",
        "short_key_forward<Bf16, 32>, sm_80: not compiled",
        "short_key_forward<Bf16, 128>: in the table, not compiled",
    ):
        assert expected in wrong


def test_the_library_loads_and_takes_no_cpu_tensor() -> None:
    assert _cuda.CUDA.absent is None
    x = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="_cuda_modulated_norm_fwd"):
        _cuda.CUDA("modulated_norm_fwd", x, x, x, None, None, 1, 1e-5, 1, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert backend_status()["cuda"] == "torch sees no NVIDIA GPU"
    x = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    with mmk.use_backend("cuda"), pytest.raises(mmk.UnsupportedError, match="the inputs are on cpu"):
        mmk.modulated_norm(x, x[:, 0], x[:, 0])
