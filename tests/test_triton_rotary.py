"""The Triton kernels of norm_rotary."""

from __future__ import annotations

from typing import Any

import op_contract as contract
import pytest
import torch
from environment import DEVICE
from fusion_cases import each_dtype
from test_norm_rotary import each_order, joined, make

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory

CASES: dict[str, dict[str, Any]] = {
    "a part of the features, a table per element": dict(features=40, half=12, length=11, table="BL"),
    "packed, whole heads": dict(features=32, packed=True, length=19, weights="k"),
    "one table with a batch dim, no norm": dict(features=8, table="1L", weights=""),
    "wide heads of few tokens": dict(features=520, length=2),
}


@each_dtype
@each_order
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, interleaved: bool, dtype: torch.dtype, triton_backend: str) -> None:
    inputs, weights = make(dtype, table_dtype=torch.float32 if "packed" in case else None, **CASES[case])
    inputs[0] = inputs[0].detach().transpose(-3, -2).contiguous().transpose(-3, -2).requires_grad_()
    with poisoned_memory():
        check_op(mmk.norm_rotary, *inputs, backend=triton_backend, interleaved=interleaved, **weights)


@each_order
def test_gradients_are_the_same_alone_and_with_any_strides(interleaved: bool, triton_backend: str) -> None:
    inputs, weights = make(features=20, half=6, length=9)

    def function(*x: torch.Tensor) -> torch.Tensor:
        return joined(*x[:4], query_weight=x[4], key_weight=x[5], interleaved=interleaved)

    leaves = [*inputs, *weights.values()]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)


def test_heads_too_wide_fall_through_and_say_why() -> None:
    x, table = torch.zeros(1, 1, 1, 4097), torch.zeros(1, 4)
    with mmk.use_backend("triton"), pytest.raises(mmk.UnsupportedError, match="4097 features are more than the 4096"):
        mmk.norm_rotary(x, x, table, table)
    if DEVICE != "cpu":
        assert mmk.explain(mmk.norm_rotary, x, x, table, table).backend == "reference"
