"""The Triton kernels of gated_concat: a part of the ordinary tests that the interpreter has time for."""

from __future__ import annotations

import op_contract as contract
import pytest
import torch
from fusion_cases import each_dtype, leaf
from test_gated_concat import make

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory

GATES = pytest.mark.parametrize("one_gate", [False, True], ids=["a gate per feature", "one gate"])


@each_dtype
@GATES
@pytest.mark.parametrize("widths", [(33, 70), (70, 0), (0, 5), (1, 1)])
@pytest.mark.parametrize("rows", [0, 37])
def test_output_and_gradients_match_the_oracle(
    rows: int, widths: tuple[int, int], one_gate: bool, dtype: torch.dtype, triton_backend: str
) -> None:
    x, y, weight, bias = make((rows,), widths, one_gate, dtype)
    with poisoned_memory():
        (out,) = check_op(mmk.gated_concat, x, y, weight, bias, backend=triton_backend)
        assert torch.equal(out[:, widths[0] : -1], y)
        check_op(mmk.gated_concat, x, y, weight, backend=triton_backend)


@GATES
def test_gradients_are_the_same_alone_with_any_strides_and_every_time(one_gate: bool, triton_backend: str) -> None:
    leaves = list(make((35,), (6, 37), one_gate))
    contract.check_each_gradient_alone(mmk.gated_concat, leaves)
    contract.check_strides(mmk.gated_concat, leaves)
    contract.check_threads_and_runs_agree(mmk.gated_concat, leaves)


@GATES
def test_many_rows_share_the_weights_gradient_and_wide_rows_take_several_blocks(
    one_gate: bool, triton_backend: str
) -> None:
    for rows, widths in ((1100, (17, 9)), (3, (700, 600))):
        check_op(mmk.gated_concat, *make((rows,), widths, one_gate), backend=triton_backend)


def test_one_tensor_may_be_both_modalities(triton_backend: str) -> None:
    x, weight = leaf(5, 6), leaf(6, 12)
    check_op(lambda x, weight: mmk.gated_concat(x, x, weight), x, weight, backend=triton_backend)
