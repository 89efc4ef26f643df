"""Random maps, points, sources and layouts. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from row_ops import strided
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    batch, heads, queries = (draw(st.integers(1, 3)) for _ in range(3))
    queries = draw(st.sampled_from((queries, 40)))
    width = draw(st.integers(1, 80))
    sides = st.integers(0, 12)
    by_source = draw(st.lists(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), min_size=1, max_size=3))
    shapes = [shape for source in by_source for shape in source]
    points = [draw(st.integers(0, 5)) for _ in shapes]
    reach = draw(st.sampled_from((0.0, 0.2, 2.0)))

    def arranged(tensor: Tensor) -> Tensor:
        tensor.requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = [arranged(random(batch, sum(h * w for h, w in s), heads, width).to(dtype)) for s in by_source]
    places = torch.rand((batch, queries, heads, sum(points), 2), generator=generator) * (1 + 2 * reach) - reach
    locations = arranged(places.to(draw(st.sampled_from((dtype, torch.float32)))))
    weights = arranged(random(batch, queries, heads, sum(points)).to(dtype))
    options: dict[str, Any] = {"points": points}
    if draw(st.booleans()):
        size = draw(st.sampled_from(((len(values),), (batch, len(values)))))
        options["presence"] = torch.rand(size, generator=generator) < 0.6
    # A location near the border of two pixels has its nearest one by rounding.
    if dtype != torch.float32 and locations.dtype == dtype and draw(st.booleans()):
        options["method"] = "discrete"
    return [values, shapes, locations, weights], options


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    inputs, options = call
    for backend in use_implementation(implementation):
        check_op(mmk.deformable_attention, *inputs, backend=backend, **options)
