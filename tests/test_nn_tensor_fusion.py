"""TensorFusion and LowRankFusion against their ops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.nn import LowRankFusion, TensorFusion

WIDTHS = (6, 5, 4)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, w, dtype=dtype) for w in WIDTHS]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_modules_are_their_ops_on_their_parameters(bias: bool, dtype: torch.dtype) -> None:
    xs = inputs(dtype)
    full = TensorFusion(WIDTHS, 8, bias=bias, dtype=dtype)
    assert torch.equal(full(xs), mmk.tensor_fusion_linear(xs, full.weight, full.bias))
    low = LowRankFusion(WIDTHS, 8, 3, bias=bias, dtype=dtype)
    assert torch.equal(low(xs), mmk.low_rank_fusion(xs, list(low.factors), low.rank_weights, low.bias))
    for module in (full, low):
        assert ("bias" in module.state_dict()) == bias
        assert {p.dtype for p in module.parameters()} == {dtype}
        module(xs).sum().backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_a_module_is_restored_from_its_state() -> None:
    xs = inputs()
    for make in (lambda: TensorFusion(WIDTHS, 8), lambda: LowRankFusion(WIDTHS, 8, 3)):
        source, target = make(), make()
        assert not torch.equal(source(xs), target(xs))
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert torch.equal(source(xs), target(xs))


def test_outputs_at_the_start_are_of_the_size_of_the_inputs() -> None:
    xs = [torch.randn(256, w) for w in (32, 32)]
    for module in (TensorFusion((32, 32), 64), LowRankFusion((32, 32), 64, 4)):
        assert 0.05 < module(xs).std() < 20


def test_modules_on_meta_and_their_representation() -> None:
    assert TensorFusion(WIDTHS, 8, device="meta").weight.shape == (8, 7 * 6 * 5)
    assert [tuple(f.shape) for f in LowRankFusion(WIDTHS, 8, 3, device="meta").factors] == [
        (3, 7, 8),
        (3, 6, 8),
        (3, 5, 8),
    ]
    assert "in_features=(6, 5, 4), out_features=8, rank=3, bias=False" in repr(LowRankFusion(WIDTHS, 8, 3, bias=False))
    assert "in_features=(6, 5, 4), out_features=8, bias=True" in repr(TensorFusion(WIDTHS, 8))


BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (ValueError, r"in_features: expected at least one modality; got none", ([], 8, 2)),
    (TypeError, r"in_features\[1\]: expected an int; got float", ([3, 2.0], 8, 2)),
    (ValueError, r"in_features\[0\]: expected a size ≥ 0; got -1", ([-1], 8, 2)),
    (TypeError, r"out_features: expected an int; got str", ([3], "8", 2)),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[m[:30] for _, m, _ in BAD])
def test_bad_sizes(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match="^LowRankFusion: " + message):
        LowRankFusion(*arguments)
    with pytest.raises(error, match="^TensorFusion: " + message):
        TensorFusion(*arguments[:2])
