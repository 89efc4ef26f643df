"""Random members, heads, layouts and windows. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

import itertools
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

small, length = st.integers(0, 4), st.one_of(st.integers(0, 5), st.integers(0, 150))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    members = range(draw(st.integers(0, 5)))
    few = draw(st.booleans())
    queries = [draw(small if few else length) for _ in members]
    keys = [draw(length) for _ in members]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim, value_dim = draw(st.integers(1, 70)), draw(st.integers(1, 70))

    def rows(count: int, heads: int, features: int) -> Tensor:
        tensor = torch.randn(count, heads, features, generator=generator).to(dtype)
        tensor.requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    def starts(lengths: list[int]) -> Tensor:
        return torch.tensor(
            [0, *itertools.accumulate(lengths)], dtype=draw(st.sampled_from((torch.int32, torch.int64)))
        )

    inputs: list[Any] = [rows(sum(queries), kv_heads * group, dim)]
    inputs += [rows(sum(keys), kv_heads, dim), rows(sum(keys), kv_heads, value_dim)]
    inputs += [starts(queries), starts(keys)]
    inputs += [max(lengths, default=0) + draw(st.integers(0, 3)) for lengths in (queries, keys)]
    options: dict[str, Any] = {"return_lse": draw(st.booleans()), "is_causal": draw(st.booleans())}
    options["causal_alignment"] = draw(st.sampled_from(("top_left", "bottom_right")))
    if draw(st.booleans()):
        options["window"] = (draw(st.integers(-1, 50)), draw(st.integers(-1, 50)))
    options["softcap"] = draw(st.sampled_from((0.0, 0.0, 2.0)))
    options["scale"] = draw(st.sampled_from((None, None, 0.3, -0.1)))
    if draw(st.integers(0, 2)) == 0:
        sinks = torch.randn(kv_heads * group, generator=generator) * 2
        options["sinks"] = sinks.to(draw(st.sampled_from((dtype, torch.float32)))).requires_grad_(draw(st.booleans()))
    return inputs, options


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    inputs, options = call
    for backend in use_implementation(implementation):
        check_op(mmk.varlen_cross_attention, *inputs, backend=backend, **options)
