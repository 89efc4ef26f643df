"""Random heads, tables, layouts and dtypes. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

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
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    table_dtype, weight_dtype = (draw(st.sampled_from((dtype, torch.float32))) for _ in range(2))
    packed = draw(st.booleans())
    batch, length = draw(st.integers(0, 3)), draw(st.one_of(st.integers(0, 9), st.integers(30, 70)))
    features = draw(st.one_of(st.integers(0, 70), st.sampled_from((64, 96, 128))))
    half = draw(st.one_of(st.just(features // 2), st.integers(0, features // 2)))

    def arranged(*shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(dtype).requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    def heads() -> Tensor:
        count = draw(st.integers(0, 4))
        return arranged(*((length, count) if packed else (batch, count, length)), features, dtype=dtype)

    lead = draw(st.sampled_from(((),) if packed else ((), (1,), (batch,))))
    tables = [arranged(*lead, length, half, dtype=table_dtype) for _ in range(2)]
    names = [name for name in ("query_weight", "key_weight") if draw(st.booleans())]
    weights = {name: arranged(features, dtype=weight_dtype) for name in names}
    return [heads(), heads(), *tables], {"interleaved": draw(st.booleans()), **weights}


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Tensor], dict[str, Any]], implementation: Any) -> None:
    for backend in use_implementation(implementation):
        check_op(mmk.norm_rotary, *call[0], backend=backend, **call[1])
