"""Random shapes, strides and options of the attention pools. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from pool_cases import POOLS, Sizes, sources
from test_concat_fusion_fuzz import arranged
from torch import Tensor

from mmkernels.testing import check_op


@fuzz(100)
@given(st.data(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(data: st.DataObject, implementation: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size = st.one_of(st.integers(0, 4), st.integers(0, 90))
    s = Sizes(draw(size), draw(st.integers(1, 6)), draw(size), draw(size), draw(size))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    function, make = POOLS[draw(st.sampled_from(list(POOLS)))]
    shape = draw(st.sampled_from((None, (s.modalities,), (s.batch, s.modalities))))
    presence = None if shape is None else draw(arranged(torch.rand(shape) > 0.4))
    parameters = {k: draw(arranged(v.detach())) if isinstance(v, Tensor) else v for k, v in make(s, dtype).items()}
    xs = sources(s, dtype, draw(st.booleans()))
    xs = draw(arranged(xs.detach())) if isinstance(xs, Tensor) else [draw(arranged(x.detach())) for x in xs]
    for backend in use_implementation(implementation):
        check_op(function, xs, backend=backend, **parameters, presence=presence)
