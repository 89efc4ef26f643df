"""The CUDA kernels of modulated_norm, concat_tokens and merge_embeddings, in the emulator."""

from __future__ import annotations

import op_contract as contract
import pytest
import torch
from fusion_cases import leaf
from simt_cases import each_half, some_schedules

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory


@each_half
@some_schedules
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("features", [40, 264, 1040])
def test_modulated_norm(features: int, norm: str | None, dtype: torch.dtype, simt_backend: str) -> None:
    weights = {} if norm is None else {n: leaf(features, dtype=dtype) for n in ("norm_weight", "norm_bias")}
    for condition in ((2, features), (2, 9, features)):
        inputs = leaf(2, 9, features, dtype=dtype), leaf(*condition, dtype=dtype), leaf(2, features, dtype=dtype)
        with poisoned_memory():
            check_op(mmk.modulated_norm, *inputs, backend=simt_backend, norm=norm, **weights)


def test_modulated_norm_of_many_tokens(simt_backend: str) -> None:
    inputs = [leaf(3, 3000, 16, dtype=torch.bfloat16), *(leaf(3, 16, dtype=torch.bfloat16) for _ in range(2))]
    check_op(mmk.modulated_norm, *inputs, backend=simt_backend)


def test_modulated_norms_gradients_are_the_same_alone_and_with_any_strides(simt_backend: str) -> None:
    leaves = [leaf(2, 5, 24, dtype=torch.bfloat16), *(leaf(2, 24, dtype=torch.bfloat16) for _ in range(2))]
    contract.check_each_gradient_alone(mmk.modulated_norm, leaves)
    contract.check_threads_and_runs_agree(mmk.modulated_norm, leaves)
    transposed = [leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1), *leaves[1:]]
    assert torch.equal(mmk.modulated_norm(*transposed), mmk.modulated_norm(*leaves))


@pytest.mark.parametrize("features", [37, 4104])
def test_modulated_norm_declines_and_says_why(features: int, simt_backend: str) -> None:
    x, condition = torch.zeros(1, 2, features, dtype=torch.half), torch.zeros(1, features, dtype=torch.half)
    with pytest.raises(mmk.UnsupportedError, match=f"{features} features: its kernel takes multiples of 8 up to 4096"):
        mmk.modulated_norm(x, condition, condition)
    if features == 37:
        x = torch.zeros(1, 2, 41, dtype=torch.half)[..., 1:]
        with pytest.raises(mmk.UnsupportedError, match="no multiple of 16 bytes"):
            mmk.modulated_norm(x, x[:, 0], x[:, 0])
