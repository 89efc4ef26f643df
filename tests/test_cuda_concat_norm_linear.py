"""The CUDA kernels of concat_norm_linear."""

from __future__ import annotations

from typing import Any

import op_contract as contract
import pytest
import torch
from cuda_cases import each_half, emulator_only, some_schedules, take_counts
from fusion_cases import ACTIVATIONS, leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory

BF16 = torch.bfloat16
each_norm = pytest.mark.parametrize("norm", ["layer", "rms"])


def inputs(
    rows: int = 70,
    widths: tuple[int, ...] = (40, 8, 72),
    features: int = 72,
    dtype: torch.dtype = BF16,
    mean: float = 0.0,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Two tiles of rows and two of features, seven steps of K, by default."""
    width = sum(widths)
    xs = [(torch.randn(rows, k) + mean).to(dtype).requires_grad_() for k in widths]
    norm = leaf(width, dtype=dtype), leaf(width, dtype=dtype)
    return xs, *norm, leaf(features, width, dtype=dtype, gain=width**-0.5), leaf(features, dtype=dtype)


@pytest.fixture(params=[64, 128])
def side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The product in tiles of this side, however small."""
    from mmkernels.ops.concat_norm_linear import kernel_cuda

    monkeypatch.setattr(kernel_cuda, "tile", lambda rows, columns: request.param)
    return int(request.param)


@each_half
@each_norm
@some_schedules
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_output_and_gradients(rows: int, norm: str, dtype: torch.dtype, cuda_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.concat_norm_linear, *inputs(rows, dtype=dtype), backend=cuda_backend, norm=norm)


@each_half
@each_norm
def test_several_tiles_each_way(side: int, norm: str, dtype: torch.dtype, cuda_backend: str) -> None:
    tensors = inputs(2 * side + 6, (side + 8, 0, 24), side + 40, dtype)
    with poisoned_memory():
        check_op(mmk.concat_norm_linear, *tensors, backend=cuda_backend, norm=norm, activation="gelu")


@each_half
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation: str | None, dtype: torch.dtype, cuda_backend: str) -> None:
    xs, g, h, weight, bias = inputs(35, (40, 8), 24, dtype)
    for norm in ("layer", "rms"):
        for norm_bias, linear_bias in ((h, bias), (None, bias), (h, None)):
            options: dict[str, Any] = {"norm": norm, "activation": activation}
            check_op(mmk.concat_norm_linear, xs, g, norm_bias, weight, linear_bias, backend=cuda_backend, **options)


@each_half
@each_norm
@pytest.mark.parametrize("rows", [5, 4100])
def test_a_mean_of_a_thousand_deviations_loses_nothing(
    rows: int, norm: str, dtype: torch.dtype, cuda_backend: str
) -> None:
    """A row by several warps, or one of many by one."""
    widths = (1040, 264) if rows == 5 else (40, 8)
    tensors = inputs(rows, widths, 8, dtype, mean=1e3)
    check_op(mmk.concat_norm_linear, *tensors, backend=cuda_backend, norm=norm)


@each_norm
def test_saved_statistics(norm: str, cuda_backend: str) -> None:
    xs, g, h, weight, bias = inputs(9, (40, 1032), 8, mean=5.0)
    xs = [x.detach() for x in xs]
    arguments = (xs, g.detach(), h.detach(), weight.detach(), bias.detach(), norm, 1e-5, "gelu")
    _, z, statistics = torch.ops.mmkernels.concat_norm_linear(*arguments, True)
    features = torch.cat(xs, -1).double()
    mean = features.mean(-1) if norm == "layer" else torch.zeros(9)
    inverse = ((features - mean[:, None]).square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(statistics, torch.stack([mean, inverse], -1).float(), rtol=1e-5, atol=1e-6)
    assert z.shape == (9, 8)
    assert torch.ops.mmkernels.concat_norm_linear(*arguments, False)[2].numel() == 0


@emulator_only
def test_the_product_has_no_bank_conflicts(side: int, cuda_backend: str) -> None:
    take_counts()
    with torch.no_grad():
        mmk.concat_norm_linear(*inputs(side + 6, (72, 40), side + 8))
    counts = take_counts()
    assert counts["mma"] == 4 * (side // 16) * (side // 8) * 160 // 16
    assert counts["matrix_loads"] > 0 and counts["bank_conflicts"] == 0


@each_norm
def test_gradients_are_the_same_alone_and_every_time(norm: str, cuda_backend: str) -> None:
    def function(*leaves: Tensor) -> Tensor:
        options: dict[str, Any] = {"norm": norm, "activation": "silu"}
        return mmk.concat_norm_linear(leaves[:2], *leaves[2:], **options)

    xs, *parameters = inputs(35, (8, 40), 24)
    contract.check_each_gradient_alone(function, [*xs, *parameters])
    contract.check_threads_and_runs_agree(function, [*xs, *parameters])


def test_any_leading_dims_and_strides(cuda_backend: str) -> None:
    xs, g, h, weight, bias = inputs(70)
    wide = torch.cat([x.detach() for x in xs], -1)
    with torch.no_grad():
        expected = mmk.concat_norm_linear(xs, g, h, weight, bias)
        assert torch.equal(mmk.concat_norm_linear(wide.split((40, 8, 72), 1), g, h, weight, bias), expected)
        cube = [x.view(7, 10, -1).transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
        assert torch.equal(mmk.concat_norm_linear(cube, g, h, weight, bias).view(70, 72), expected)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


DECLINED: dict[str, tuple[list[Tensor], Tensor, Tensor]] = {
    r"xs\[0\]'s width is 12: its kernel takes multiples of 8": ([zeros(2, 12)], zeros(12), zeros(8, 12)),
    "N is 7: its kernel takes multiples of 8": ([zeros(2, 8)], zeros(8), zeros(7, 8)),
    "17 sources: its kernel takes up to 16": ([zeros(2, 8)] * 17, zeros(136), zeros(8, 136)),
    "no multiple of 16 bytes": ([zeros(2, 9)[:, 1:]], zeros(8), zeros(8, 8)),
    "a tensor or a step": ([zeros(2, 8)], zeros(9)[1:], zeros(8, 8)),
}


@pytest.mark.parametrize("reason", DECLINED)
def test_declines_and_says_why(reason: str, cuda_backend: str) -> None:
    xs, norm_weight, weight = DECLINED[reason]
    with pytest.raises(mmk.UnsupportedError, match=reason):
        mmk.concat_norm_linear(xs, norm_weight, None, weight)
