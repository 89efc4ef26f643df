"""merge_attention and the attention pools in Triton: a part of the ordinary tests that the interpreter has time for.

``MMKERNELS_BACKEND=triton`` runs all of these ops' tests on Triton.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agreement import agree
from fusion_cases import each_dtype, flat, spoiled
from op_contract import check_each_gradient_alone, check_every_element_is_written, check_strides, gradients
from pool_cases import POOLS, Sizes, call, sources
from test_merge_attention import make, merged, merged_leaves

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits

pytestmark = pytest.mark.usefixtures("triton_backend")

MERGES: dict[str, dict[str, Any]] = {
    "odd sizes, some attend to nothing": dict(parts=3, absent=0.5, shape=(2, 3, 37, 19)),
    "whole vectors, large lses": dict(shape=(3, 70, 64), gain=1e3),
    "five parts of wide rows": dict(parts=5, shape=(3, 2, 2500)),
}


@pytest.mark.parametrize("case", MERGES)
@each_dtype
def test_merge_attention(case: str, dtype: torch.dtype) -> None:
    check_op(mmk.merge_attention, *make(dtype, **MERGES[case]), backend="triton")


@pytest.mark.parametrize("dims", [3, 4, 5])
def test_merge_attention_of_parts_that_lie_otherwise_in_memory(dims: int) -> None:
    """Rows of three dims that do not merge are read as they lie, those of more are copied."""
    shape = (2, 3, 4, 5, 8)[5 - dims :]
    outputs, lses = make(parts=3, shape=shape)
    for part in ([0], [1], [0, 1, 2]):
        for i in part:
            outputs[i] = outputs[i].detach().transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()
        check_op(mmk.merge_attention, outputs, lses, backend="triton")


def test_merge_attention_in_memory_and_with_partial_gradients() -> None:
    check_every_element_is_written(merged, merged_leaves())
    check_each_gradient_alone(merged, merged_leaves())
    check_strides(merged, merged_leaves())
    assert same_bits(gradients(merged, leaves := merged_leaves(rows=200)), gradients(merged, leaves))


def test_merge_attention_does_not_read_a_part_that_attends_to_nothing() -> None:
    outputs, lses = make(torch.bfloat16, parts=3, absent=0.4)
    spoiled = [x.detach().masked_fill(y[..., None] == -torch.inf, math.nan) for x, y in zip(outputs, lses, strict=True)]
    results = []
    for parts in (outputs, spoiled):
        leaves = [x.detach().requires_grad_() for x in (*parts, *lses)]
        out, lse = mmk.merge_attention(leaves[:3], leaves[3:])
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, (out.detach(), torch.ones_like(lse)))])
    assert agree(*results)


def test_what_merge_attention_leaves_to_other_backends() -> None:
    with pytest.raises(mmk.UnsupportedError, match="65 parts are more than the 64"):
        mmk.merge_attention([torch.zeros(2, 4)] * 65, [torch.zeros(2)] * 65)
    with pytest.raises(mmk.UnsupportedError, match="9000 features are more than the 8192"):
        mmk.merge_attention([torch.zeros(2, 9000)], [torch.zeros(2)])


@pytest.mark.parametrize("pool", POOLS)
@each_dtype
def test_attention_pool(pool: str, dtype: torch.dtype) -> None:
    function, make_parameters = POOLS[pool]
    for s, stacked in ((Sizes(batch=37, modalities=4, width=70), True), (Sizes(), False)):
        presence = torch.rand(s.batch, s.modalities) > 0.4
        xs, parameters = sources(s, dtype, stacked), make_parameters(s, dtype)
        check_op(function, xs, backend="triton", **parameters, presence=presence)


@pytest.mark.parametrize("pool", POOLS)
def test_attention_pool_in_memory_and_with_partial_gradients(pool: str) -> None:
    for stacked in (False, True):
        function, leaves = call(pool, Sizes(), stacked=stacked, presence=torch.rand(9, 3) > 0.3)
        check_every_element_is_written(function, leaves)
        check_each_gradient_alone(function, leaves)
        check_strides(function, leaves)
        assert same_bits(gradients(function, leaves), gradients(function, leaves))


@pytest.mark.parametrize("pool", POOLS)
def test_attention_pool_does_not_read_an_absent_modality(pool: str) -> None:
    function, make_parameters = POOLS[pool]
    s = Sizes()
    presence = torch.rand(s.batch, s.modalities) > 0.4
    presence[:, 0], presence[1] = False, False
    xs, parameters = sources(s), make_parameters(s, torch.float32)
    results = []
    for filler in (0.0, math.nan):
        leaves = spoiled(xs, presence, filler)
        pooled, weights = function(leaves, **parameters, presence=presence)
        wanted = flat([leaves, *parameters.values()])
        results.append([pooled, weights, *torch.autograd.grad(pooled.sin().sum() + weights.sin().sum(), wanted)])
    assert same_bits(*results)
    assert all(x.isfinite().all() for x in results[0])


@pytest.mark.parametrize("pool", POOLS)
def test_what_attention_pools_leave_to_other_backends(pool: str) -> None:
    function, make_parameters = POOLS[pool]
    s = Sizes(modalities=65)
    with pytest.raises(mmk.UnsupportedError, match="65 modalities are more than the 64"):
        function(sources(s), **make_parameters(s, torch.float32))
