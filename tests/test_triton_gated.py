"""The Triton kernels of gated_concat and gated_fusion: ordinary tests that the interpreter has time for."""

from __future__ import annotations

import math
from typing import Any

import op_contract as contract
import pytest
import torch
from agreement import agree
from fusion_cases import each_dtype, flat, leaf, presence_patterns, spoiled
from test_gated_concat import make
from test_gated_fusion import FORMS, each_form
from test_gated_fusion import make as make_fusion
from torch import Tensor

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


@each_dtype
@each_form
def test_gated_fusion_matches_the_oracle(form: str, dtype: torch.dtype, triton_backend: str) -> None:
    inputs = make_fusion(*FORMS[form], (35,), 67, dtype)
    xs, weights, _, gate_weight, _ = inputs
    with poisoned_memory():
        check_op(mmk.gated_fusion, xs, weights, None, gate_weight, backend=triton_backend)
        presence = torch.rand(35, len(xs)) > 0.4
        check_op(mmk.gated_fusion, *inputs, presence=presence, backend=triton_backend)


@pytest.mark.parametrize(
    "shape",
    [
        dict(widths=(7,)),
        dict(widths=(0, 12, 0)),
        dict(widths=(0, 0), sigmoid=True),
        dict(lead=(2, 0)),
        dict(features=0),
        dict(lead=()),
        dict(lead=(700,), widths=(17, 9), sigmoid=True),
    ],
    ids=str,
)
def test_gated_fusion_of_any_shape(shape: dict[str, Any], triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.gated_fusion, *make_fusion(**shape), backend=triton_backend)


@each_form
def test_gated_fusion_reads_nothing_of_absent_modalities(form: str, triton_backend: str) -> None:
    xs, *parameters = make_fusion(*FORMS[form])
    for presence in presence_patterns(9, len(xs)).values():
        results = []
        for filler in (0.0, math.nan):
            sources = spoiled(xs, presence, filler)
            y = mmk.gated_fusion(sources, *parameters, presence=presence)
            results.append([y, *torch.autograd.grad(y, flat([sources, parameters]), torch.ones_like(y))])
        assert agree(*results)
        assert all(x.isfinite().all() for x in results[1])


@each_form
def test_gated_fusions_gradients_are_the_same_alone_with_any_strides_and_every_time(
    form: str, triton_backend: str
) -> None:
    inputs = make_fusion(*FORMS[form])
    count = len(inputs[0])

    def function(*leaves: Tensor) -> Tensor:
        lists = (leaves[i * count : (i + 1) * count] for i in range(3))
        return mmk.gated_fusion(*map(list, lists), *leaves[3 * count :])

    leaves = flat(inputs)
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)
