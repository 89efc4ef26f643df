"""The Triton kernels of concat_norm_linear: a part of the ordinary tests that the interpreter has time for."""

from __future__ import annotations

import op_contract as contract
import pytest
import torch
from fusion_cases import ACTIVATIONS, each_dtype
from test_concat_norm_linear import make
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits

NORMS = pytest.mark.parametrize("norm", ["layer", "rms"])
ODD = (33, 0, 1, 70)


@each_dtype
@NORMS
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_output_and_gradients_match_the_oracle(rows: int, norm: str, dtype: torch.dtype, triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.concat_norm_linear, *make((rows,), ODD, 65, dtype), backend=triton_backend, norm=norm)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_and_without_biases(activation: str | None, triton_backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        xs, g, h, weight, bias = make((35,), (6, 37), 18, dtype)
        check_op(mmk.concat_norm_linear, xs, g, h, weight, bias, backend=triton_backend, activation=activation)
        check_op(mmk.concat_norm_linear, xs, g, None, weight, backend=triton_backend, activation=activation)


@each_dtype
@NORMS
def test_features_far_from_zero(norm: str, dtype: torch.dtype, triton_backend: str) -> None:
    inputs = make((33,), (600, 70), 40, dtype, mean=1e3)
    check_op(mmk.concat_norm_linear, *inputs, backend=triton_backend, factor=4.0, norm=norm, activation="gelu")


@pytest.mark.parametrize(("widths", "features"), [((0, 0), 5), ((13, 4), 0)], ids=["no width", "no features"])
def test_nothing_to_multiply(widths: tuple[int, ...], features: int, triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.concat_norm_linear, *make(widths=widths, features=features), backend=triton_backend)


def test_gradients_are_the_same_alone_with_any_strides_and_every_time(triton_backend: str) -> None:
    """By any number of threads they are not on a CPU: torch's own products are among them."""

    def function(*leaves: Tensor) -> Tensor:
        return mmk.concat_norm_linear(leaves[:2], *leaves[2:], activation="silu")

    xs, *parameters = make((35,), (6, 37), 18)
    leaves = [*xs, *parameters]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    assert same_bits(contract.gradients(function, leaves), contract.gradients(function, leaves))


def test_many_rows(triton_backend: str) -> None:
    inputs = make((700,), (20, 9), 17, torch.bfloat16)
    check_op(mmk.concat_norm_linear, *inputs, backend=triton_backend, norm="rms", activation="relu")
