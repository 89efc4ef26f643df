"""The Triton kernels of concat_linear."""

from __future__ import annotations

import op_contract as contract
import pytest
import torch
from fusion_cases import ACTIVATIONS, each_dtype, leaf, presence_patterns, spoiled
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory


def inputs(
    rows: int = 70, widths: tuple[int, ...] = (33, 0, 1, 70), features: int = 65, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor, Tensor]:
    xs = [leaf(rows, k, dtype=dtype) for k in widths]
    return xs, leaf(features, sum(widths), dtype=dtype, gain=sum(widths) ** -0.5), leaf(features, dtype=dtype)


@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_output_and_gradients_match_the_oracle(rows: int, dtype: torch.dtype, triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.concat_linear, *inputs(rows, dtype=dtype), backend=triton_backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gate_and_residual(activation: str | None, triton_backend: str) -> None:
    for gate in (leaf(), leaf(65)):
        options = {"gate": gate, "residual": leaf(70, 65)}
        check_op(mmk.concat_linear, *inputs(), backend=triton_backend, activation=activation, **options)
    check_op(mmk.concat_linear, *inputs(dtype=torch.bfloat16), backend=triton_backend, activation=activation)


@pytest.mark.parametrize("pattern", presence_patterns(70, 3))
def test_what_is_absent_is_never_read_and_gets_no_gradient(pattern: str, triton_backend: str) -> None:
    presence = presence_patterns(70, 3)[pattern]
    xs, weight, bias = inputs(widths=(33, 20, 70))
    xs = spoiled(xs, presence, torch.nan)
    out = mmk.concat_linear(xs, weight, bias, activation="gelu", presence=presence)
    clean = [torch.where(presence[..., i : i + 1], x.detach(), 0.0).requires_grad_() for i, x in enumerate(xs)]
    check_op(mmk.concat_linear, clean, weight, bias, backend=triton_backend, activation="gelu", presence=presence)
    expected = mmk.concat_linear(clean, weight, bias, activation="gelu", presence=presence)
    assert torch.equal(out, expected)
    for got, exact in zip(
        torch.autograd.grad(out.sum(), [*xs, weight]),
        torch.autograd.grad(expected.sum(), [*clean, weight]),
        strict=True,
    ):
        assert torch.equal(got, exact)


def test_gradients_are_the_same_alone_with_any_strides_and_every_time(triton_backend: str) -> None:
    def function(*leaves: Tensor) -> Tensor:
        return mmk.concat_linear(leaves[:2], *leaves[2:], activation="silu")

    xs, weight, bias = inputs(35, (6, 37), 18)
    leaves = [*xs, weight, bias]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)


def test_many_rows_share_the_weights_gradient(triton_backend: str) -> None:
    check_op(mmk.concat_linear, *inputs(1100, (20, 9), 17), backend=triton_backend, activation="relu")


@each_dtype
@pytest.mark.parametrize("widths", [(64, 128), (64, 64, 64, 64)])
def test_tensor_descriptors(
    widths: tuple[int, ...], dtype: torch.dtype, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of small tensors, which `pays` would not take."""
    from mmkernels.ops.concat_linear import kernel_triton, tma_triton

    calls = []
    monkeypatch.setattr(
        kernel_triton, "pays", lambda sources, weight: calls.append(1) or tma_triton.describable(sources, weight)
    )
    tensors = inputs(70, widths, 48, dtype)
    options = {"gate": leaf(48, dtype=dtype), "residual": leaf(70, 48, dtype=dtype), "activation": "gelu"}
    with poisoned_memory():
        check_op(mmk.concat_linear, *tensors, backend=triton_backend, **options)
    assert calls and tma_triton.describable(tensors[0], tensors[1])
    assert not tma_triton.describable([x[:, 1:] for x in tensors[0]], tensors[1])
    assert not tma_triton.describable([x[:1].expand_as(x) for x in tensors[0]], tensors[1])
