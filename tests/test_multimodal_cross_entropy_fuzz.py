"""Random modalities, labels, losses and layouts. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

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
    batch = draw(st.sampled_from((0, 1, 2, 7, 40)))
    classes = draw(st.lists(st.sampled_from((1, 2, 3, 16, 31, 64, 129, 1000)), min_size=1, max_size=4))
    gain = draw(st.sampled_from((0.1, 3.0, 1000.0)))

    def arranged(tensor: Tensor) -> Tensor:
        tensor.requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def labels_below(count: int) -> Tensor:
        drawn = torch.randint(0, count, (batch,), generator=generator)
        return torch.where(torch.rand(batch, generator=generator) < 0.2, -100, drawn)

    logits = [arranged((random(batch, c) * gain).to(dtype)) for c in classes]
    labels = [labels_below(c) for c in classes] if draw(st.booleans()) else labels_below(min(classes))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        name = draw(st.sampled_from(("weights", "log_vars")))
        options[name] = arranged(random(len(classes)).to(draw(st.sampled_from((dtype, torch.float32)))))
    if draw(st.booleans()):
        options["modulation"] = random(len(classes)).to(dtype)
    if draw(st.booleans()):
        size = draw(st.sampled_from(((len(classes),), (batch, len(classes)))))
        options["presence"] = torch.rand(size, generator=generator) < 0.6
    options |= draw(
        st.sampled_from(
            ({}, {"label_smoothing": 0.3}, {"robust": "symmetric"}, {"robust": "gce"}, {"robust": "gce", "q": 0.01})
        )
    )
    return [logits, labels], options


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    inputs, options = call
    for backend in use_implementation(implementation):
        check_op(mmk.multimodal_cross_entropy, *inputs, backend=backend, **options)
