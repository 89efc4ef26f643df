"""deformable_attention in Triton: a part of the ordinary tests that the interpreter has time for."""

from __future__ import annotations

import math
from typing import Any

import op_contract as contract
import pytest
import torch
from fusion_cases import each_dtype, few_dtypes
from test_deformable_attention import attend, leaves_of, make, sources
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits

pytestmark = pytest.mark.usefixtures("triton_backend")

SIZES: dict[str, dict[str, Any]] = {
    "odd sizes": dict(queries=3, heads=2, shapes=((3, 5), (1, 1), (2, 3)), points=3),
    "whole vectors": dict(width=32, heads=2, shapes=((4, 4), (2, 2)), batch=1),
    "more samples at a pixel than one block": dict(width=5, queries=23, heads=1, shapes=((1, 2),)),
    "features in two blocks": dict(width=261, queries=2, heads=1, batch=1, shapes=((3, 2),)),
    "far beyond the maps": dict(reach=3.0, batch=1, heads=2, shapes=((3, 5), (2, 2))),
    "empty levels": dict(shapes=((0, 3), (3, 2), (0, 5), (2, 2), (4, 0)), batch=1, heads=2, queries=3),
    "no levels": dict(shapes=()),
    "no points": dict(points=0, shapes=((3, 2),)),
    "no queries": dict(queries=0, shapes=((3, 2),)),
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no features": dict(width=0),
}


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("size", SIZES)
@each_dtype
def test_output_and_gradients(size: str, method: Any, dtype: torch.dtype) -> None:
    value, shapes, locations, weights = make(dtype, **SIZES[size])
    with poisoned_memory():
        (out,) = check_op(mmk.deformable_attention, value, shapes, locations, weights, backend="triton", method=method)
    assert out.is_contiguous()


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@few_dtypes
def test_sources_of_which_some_are_absent(method: Any, dtype: torch.dtype) -> None:
    values, shapes, locations, weights = sources(dtype, queries=2, heads=1, points=3)
    for presence in ([True, True, False], [[True, True, True], [False, True, True]]):
        mask = torch.tensor(presence)
        with torch.no_grad():
            for i, value in enumerate(values):
                value[~mask.expand(2, 3)[:, i]] = torch.nan
        options = dict(presence=mask, method=method, backend="triton")
        check_op(mmk.deformable_attention, values, shapes, locations, weights, **options)
    points = [2, 0, 3]
    flat, shares = (x.detach()[:, :, :, 0].repeat_interleave(2, 3)[:, :, :, :5] for x in (locations, weights))
    arguments = [v.detach().nan_to_num().requires_grad_() for v in values], shapes, flat, shares
    check_op(mmk.deformable_attention, *arguments, points=points, method=method, backend="triton")


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@few_dtypes
def test_locations_that_are_not_finite_sample_nothing_and_get_no_gradient(method: Any, dtype: torch.dtype) -> None:
    value, shapes, locations, weights = make(dtype, queries=4, heads=2, points=3, shapes=((3, 2), (1, 1), (2, 3)))
    with torch.no_grad():
        locations[0, 1, 0, 0, 2, 0] = math.nan
        locations[1, 2, 1, 2, 0, 1] = math.inf
        locations[1, 3] = -math.inf
    check_op(mmk.deformable_attention, value, shapes, locations, weights, backend="triton", method=method)
    out = mmk.deformable_attention(value, shapes, locations, weights, method=method)
    assert out[1, 3].eq(0).all()
    of_value, of_locations, of_weights = torch.autograd.grad(out.sum(), (value, locations, weights))
    hidden = ~locations.isfinite().all(-1)
    assert of_locations[hidden].eq(0).all() and of_weights[hidden].eq(0).all()
    assert all(g.isfinite().all() for g in (of_value, of_locations, of_weights))


def test_only_the_pixels_around_a_location_are_read() -> None:
    value = torch.full((1, 25, 1, 17), math.nan)
    value.view(1, 5, 5, 17)[:, :2, :2] = 1.0
    places = torch.tensor([[0.0, 0.0], [0.2, 0.2], [0.05, 0.25], [-0.05, 0.1], [1.2, 0.5]]).view(1, 5, 1, 1, 1, 2)
    leaves = [value.requires_grad_(), places.requires_grad_(), torch.ones(1, 5, 1, 1, 1).requires_grad_()]
    out = mmk.deformable_attention(leaves[0], [(5, 5)], *leaves[1:])
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.25, 1.0, 0.75, 0.25, 0.0]))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_locations_may_be_float32_beside_other_dtypes() -> None:
    value, shapes, locations, weights = make(torch.bfloat16, batch=1, heads=1, shapes=((30, 5),))
    exact = (locations.detach().float() + 1e-3).requires_grad_()
    check_op(mmk.deformable_attention, value, shapes, exact, weights, backend="triton")


def test_strides_single_gradients_and_runs_agree() -> None:
    leaves = leaves_of(queries=2, heads=1, points=2, width=18)
    contract.check_each_gradient_alone(attend, leaves)
    contract.check_strides(attend, leaves)
    contract.check_every_element_is_written(attend, leaves)
    contract.check_threads_and_runs_agree(attend, leaves)


def test_the_order_of_equal_samples_is_that_of_the_queries() -> None:
    """A pixel that many samples of very different sizes reach, twice: each sum has one order."""
    value = torch.ones(1, 1, 1, 16).requires_grad_()
    weights = (10.0 ** torch.linspace(-3, 7, 41))[torch.randperm(41)].view(1, 41, 1, 1, 1).requires_grad_()
    places = torch.full((1, 41, 1, 1, 1, 2), 0.5)

    def gradient(algorithms: bool) -> list[Tensor]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(algorithms)
        try:
            out = mmk.deformable_attention(value, [(1, 1)], places, weights)
            return list(torch.autograd.grad(out.sum(), (value, weights)))
        finally:
            torch.use_deterministic_algorithms(before)

    assert same_bits(gradient(True), gradient(False))
    torch.testing.assert_close(gradient(False)[0][0, 0, 0], weights.detach().sum().expand(16))
