"""Any sizes of any op's examples on every instruction set: outputs and gradients obey the precision rule."""

from __future__ import annotations

import pytest
import torch
from calls import CALLS, Call, flat, mapped
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st

import mmkernels as mmk
from mmkernels.testing import check_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLAT = [call for call in CALLS.values() if "linear" not in call.inputs()]  # whose pairs are no arguments of `check_op`


@pytest.mark.parametrize("call", FLAT, ids=str)
@fuzz(8)
@given(st.data())
def test_any_sizes_obey_the_precision_rule(call: Call, data: st.DataObject) -> None:
    known = call.default_sizes()
    few = {"H", "M", "R"} | ({"B"} if any(name[0] in "LT" for name in known) else set())
    sizes = {name: data.draw(st.integers(0, 4 if name in few else 40), name) for name in known}
    dtype, seed = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 1000))
    inputs = mapped(call.at(**sizes).inputs(dtype, seed), lambda x: x.requires_grad_())
    try:
        with mmk.use_backend("reference"):
            call.public(**inputs)
    except ValueError:  # sizes that do not go together
        return
    for backend in use_implementation(data.draw(st.sampled_from(FUZZED))):
        check_op(lambda **arguments: list(flat(call.public(**arguments))), backend=backend, **inputs)
