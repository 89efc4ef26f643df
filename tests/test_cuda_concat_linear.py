"""The CUDA kernels of concat_linear."""

from __future__ import annotations

from typing import Any

import op_contract as contract
import pytest
import torch
from cuda_cases import each_half, emulator_only, some_schedules, take_counts
from fusion_cases import ACTIVATIONS, leaf, presence_patterns, spoiled
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits

BF16 = torch.bfloat16


def inputs(
    rows: int = 70, widths: tuple[int, ...] = (40, 8, 72), features: int = 72, dtype: torch.dtype = BF16
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two tiles of rows and two of features, seven steps of K, by default."""
    xs = [leaf(rows, k, dtype=dtype) for k in widths]
    return xs, leaf(features, sum(widths), dtype=dtype, gain=max(sum(widths), 1) ** -0.5), leaf(features, dtype=dtype)


@pytest.fixture(params=[64, 128])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every product in tiles of this side, however small."""
    from mmkernels.ops.concat_linear import kernel_cuda

    monkeypatch.setattr(kernel_cuda, "tile", lambda rows, columns: request.param)
    return int(request.param)


@each_half
@some_schedules
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_output_and_gradients(rows: int, dtype: torch.dtype, cuda_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.concat_linear, *inputs(rows, dtype=dtype), backend=cuda_backend)


@each_half
def test_several_tiles_each_way_with_everything(side: int, dtype: torch.dtype, cuda_backend: str) -> None:
    xs, weight, bias = inputs(2 * side + 6, (side + 8, 0, 24), side + 40, dtype)
    presence = torch.rand(2 * side + 6, 3) > 0.4
    presence[side:, 2] = False
    options = {"gate": leaf(side + 40, dtype=dtype), "residual": leaf(2 * side + 6, side + 40, dtype=dtype)}
    with poisoned_memory():
        check_op(
            mmk.concat_linear, xs, weight, bias, backend=cuda_backend, activation="silu", presence=presence, **options
        )


def test_sources_without_features_leave_the_bias(cuda_backend: str) -> None:
    check_op(mmk.concat_linear, *inputs(70, (0, 0), 24), backend=cuda_backend, activation="gelu")
    assert mmk.concat_linear([torch.zeros(2, 8, dtype=BF16)], torch.zeros(0, 8, dtype=BF16)).shape == (2, 0)


def test_more_tiles_of_rows_than_run_together(cuda_backend: str) -> None:
    xs, weight, bias = inputs(64 * 9 + 1, (8,), 136)
    check_op(mmk.concat_linear, xs, weight, bias, backend=cuda_backend, activation="relu")


@each_half
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_gate_and_residual(activation: str | None, dtype: torch.dtype, cuda_backend: str) -> None:
    tensors = inputs(35, (40, 8), 24, dtype)
    check_op(mmk.concat_linear, *tensors, backend=cuda_backend, activation=activation)
    for gate in (leaf(dtype=dtype), leaf(24, dtype=dtype)):
        options = {"gate": gate, "residual": leaf(35, 24, dtype=dtype)}
        check_op(mmk.concat_linear, *tensors, backend=cuda_backend, activation=activation, **options)
    check_op(mmk.concat_linear, *tensors[:2], backend=cuda_backend, activation=activation, gate=leaf(dtype=dtype))


@some_schedules
@pytest.mark.parametrize("pattern", presence_patterns(70, 3))
def test_what_is_absent_is_never_read_and_gets_no_gradient(pattern: str, cuda_backend: str) -> None:
    presence = presence_patterns(70, 3)[pattern]
    xs, weight, bias = inputs(features=24)
    options: dict[str, Any] = {"activation": "gelu", "presence": presence}
    results = []
    for filler in (0.0, torch.nan):
        sources = spoiled(xs, presence, filler)
        with poisoned_memory():
            y = mmk.concat_linear(sources, weight, bias, **options)
            results.append([y, *torch.autograd.grad(y, [*sources, weight, bias], torch.ones_like(y))])
    assert same_bits(*results)
    for i, dx in enumerate(results[0][1:4]):
        assert not dx[~presence.expand(70, 3)[:, i]].any()
    check_op(mmk.concat_linear, spoiled(xs, presence, 0.0), weight, bias, backend=cuda_backend, **options)


@emulator_only
def test_a_source_that_no_row_of_a_block_has_costs_nothing(cuda_backend: str) -> None:
    xs, weight, bias = inputs(70, (64, 96), 64)
    presence = torch.ones(70, 2, dtype=torch.bool)
    presence[:64, 1] = False

    def products(presence: Tensor | None) -> int:
        take_counts()
        with torch.no_grad():
            mmk.concat_linear(xs, weight, bias, presence=presence)
        return take_counts()["mma"]

    full = products(None)
    assert full == 2 * 160 // 16 * 32  # two tiles, in each 4 x 8 products for every 16 of K
    assert products(presence) == full - 96 // 16 * 32
    assert products(torch.tensor([True, False])) == full - 2 * 96 // 16 * 32


@emulator_only
def test_the_weights_gradient_takes_only_the_rows_that_are_there(side: int, cuda_backend: str) -> None:
    """Over three listings of rows, the middle one empty."""
    from mmkernels import _cuda

    rows, width, features = 4200, 16, 8
    presence = torch.rand(rows, 1) > 0.9
    presence[2048:4096] = False
    dz, x = (torch.randn(rows, n).to(BF16) for n in (features, width))
    x[~presence[:, 0]] = torch.nan
    dz[~presence[:, 0]] = torch.nan
    dweight = torch.full((features, width), torch.nan, dtype=BF16)
    take_counts()
    _cuda.SIMT("concat_linear_dw", dz, x, presence, 0, side, rows + 24, dweight)
    there = presence[:, 0]
    steps = -(-int(there[:2048].sum()) // 32) + -(-int(there[4096:].sum()) // 32)
    assert take_counts()["mma"] == steps * 2 * (side // 16) * (side // 8)
    expected = dz[there].double().T @ x[there].double()
    torch.testing.assert_close(dweight.double(), expected, rtol=2**-8, atol=1e-4)


def test_shares_of_rows_add_up(cuda_backend: str) -> None:
    xs, weight, bias = inputs(1100, (24,), 16)
    check_op(mmk.concat_linear, xs, weight, bias, backend=cuda_backend, presence=torch.rand(1100, 1) > 0.3)


@emulator_only
def test_the_products_have_no_bank_conflicts(side: int, cuda_backend: str) -> None:
    xs, weight, bias = inputs(side + 6, (72, 40), side + 8)
    take_counts()
    y = mmk.concat_linear(xs, weight, bias, presence=torch.rand(side + 6, 2) > 0.3)
    torch.autograd.grad(y.sum(), [*xs, weight])
    counts = take_counts()
    assert counts["matrix_loads"] > 0 and counts["bank_conflicts"] == 0


@pytest.mark.parametrize("present", [False, True])
def test_gradients_are_the_same_alone_and_every_time(present: bool, cuda_backend: str) -> None:
    presence = torch.rand(35, 2) > 0.3 if present else None

    def function(*leaves: Tensor) -> Tensor:
        options: dict[str, Any] = {"residual": leaves[4], "gate": leaves[5], "presence": presence}
        return mmk.concat_linear(leaves[:2], *leaves[2:4], activation="silu", **options)

    xs, weight, bias = inputs(35, (8, 40), 24)
    leaves = [*xs, weight, bias, leaf(35, 24, dtype=BF16), leaf(24, dtype=BF16)]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)


def test_any_leading_dims_and_strides(cuda_backend: str) -> None:
    xs, weight, bias = inputs(70)
    wide = torch.cat([x.detach() for x in xs], -1)
    weights = torch.cat([weight.detach(), weight.detach()], 1)[:, 120:]
    residual = leaf(70, 80, dtype=BF16).detach()[:, :72]
    with torch.no_grad():
        expected = mmk.concat_linear(xs, weight, bias, residual=residual)
        got = mmk.concat_linear(wide.split((40, 8, 72), 1), weights, bias, residual=residual)
        assert torch.equal(got, expected)
        presence = torch.rand(70, 3) > 0.4
        expected = mmk.concat_linear(xs, weight, bias, presence=presence)
        cube = [x.view(7, 10, -1).transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
        got = mmk.concat_linear(cube, weight, bias, presence=presence.T.contiguous().T.view(7, 10, 3))
        assert torch.equal(got.view(70, 72), expected)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


DECLINED: dict[str, tuple[list[Tensor], Tensor, dict[str, Tensor]]] = {
    r"xs\[1\]'s width is 12: its kernel takes multiples of 8": ([zeros(2, 8), zeros(2, 12)], zeros(8, 20), {}),
    "N is 7: its kernel takes multiples of 8": ([zeros(2, 8)], zeros(7, 8), {}),
    "17 sources: its kernel takes up to 16": ([zeros(2, 8)] * 17, zeros(8, 136), {}),
    "no multiple of 16 bytes": ([zeros(2, 9)[:, 1:]], zeros(8, 8), {}),
    "step along one of its dims": ([zeros(2, 8)], zeros(8, 12)[:, :8], {}),
    "a tensor or a step": ([zeros(2, 8)], zeros(8, 8), {"bias": zeros(9)[1:]}),
    "a tensor or": ([zeros(2, 8)], zeros(8, 8), {"gate": zeros(9)[1:]}),
    "a tensor": ([zeros(2, 8)], zeros(8, 8), {"residual": zeros(2, 9)[:, 1:]}),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_declines_and_says_why(reason: str, cuda_backend: str) -> None:
    xs, weight, options = DECLINED[reason]
    with pytest.raises(mmk.UnsupportedError, match=reason):
        mmk.concat_linear(xs, weight, **options)


def test_a_scalar_gate_may_lie_anywhere(cuda_backend: str) -> None:
    gate = torch.ones(3, dtype=BF16)[1]
    x, weight = torch.ones(2, 8, dtype=BF16), torch.ones(8, 8, dtype=BF16)
    assert torch.equal(mmk.concat_linear([x], weight, gate=gate), torch.full((2, 8), 6.09375, dtype=BF16))
