"""Random parts, layouts and lses. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

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
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    rows = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    features, parts = draw(st.integers(0, 80)), range(draw(st.integers(1, 4)))
    gain, absent = draw(st.sampled_from((0.0, 1.0, 30.0))), draw(st.sampled_from((0.0, 0.3, 1.0)))

    def arranged(tensor: Tensor) -> Tensor:
        tensor.requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    outputs = [arranged(torch.randn(*rows, features, generator=generator).to(dtype)) for _ in parts]
    hidden = [torch.rand(rows, generator=generator) < absent for _ in parts]
    lses = [arranged((torch.randn(rows, generator=generator) * gain).masked_fill(h, -torch.inf)) for h in hidden]
    return outputs, lses


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Tensor], list[Tensor]], implementation: Any) -> None:
    for backend in use_implementation(implementation):
        check_op(mmk.merge_attention, *call, backend=backend)
