"""Random calls of decision_fusion and distillation_loss. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_concat_fusion_fuzz import arranged
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.decision_fusion import METHODS
from mmkernels.ops.distillation_loss import KINDS
from mmkernels.testing import check_op

SIZES = st.one_of(st.integers(0, 4), st.integers(0, 150))
DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def drawn_logits(draw: st.DrawFn, dtype: torch.dtype, *shape: int) -> Tensor:
    """Of any size that does not saturate the softmax, perhaps with classes that are excluded."""
    z = torch.randn(shape) * draw(st.sampled_from((0.1, 1.0, 3.0)))
    z = z.masked_fill(torch.rand(shape) < draw(st.sampled_from((0.0, 0.0, 0.3))), -torch.inf)
    return draw(arranged(z.to(dtype)))


@fuzz(100)
@given(st.data(), st.sampled_from(FUZZED))
def test_any_decision_obeys_the_precision_rule(data: st.DataObject, implementation: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, count, classes, dtype = draw(SIZES), draw(st.integers(1, 6)), draw(SIZES), draw(DTYPES)
    method = draw(st.sampled_from(METHODS))
    logits = [drawn_logits(draw, dtype, rows, classes) for _ in range(count)]
    shapes = (None, (count,), (rows, count))
    of_weights, of_presence = draw(st.sampled_from(shapes)), draw(st.sampled_from(shapes))
    weights = None if of_weights is None else draw(arranged((torch.rand(of_weights) + 0.1).to(dtype)))
    presence = None if of_presence is None else draw(arranged(torch.rand(of_presence) > 0.3))
    for backend in use_implementation(implementation):
        options: dict[str, Any] = dict(method=method, presence=presence, backend=backend, grad=method != "vote")
        check_op(mmk.decision_fusion, logits, weights, **options)


@fuzz(100)
@given(st.data(), st.sampled_from(FUZZED))
def test_any_distillation_obeys_the_precision_rule(data: st.DataObject, implementation: Any) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.lists(st.integers(0, 6), max_size=3))
    shape, dtype = (*lead, draw(SIZES)), draw(DTYPES)
    student, teacher = (drawn_logits(draw, dtype, *shape) for _ in range(2))
    both = (student == -torch.inf) | (teacher == -torch.inf)  # so that the divergence is finite
    if draw(st.booleans()):
        student, teacher = (x.detach().masked_fill(both, -torch.inf).requires_grad_() for x in (student, teacher))
    else:
        student, teacher = (x.detach().masked_fill(both, 0).requires_grad_() for x in (student, teacher))
    options: dict[str, Any] = dict(
        temperature=draw(st.sampled_from((0.5, 1.0, 2.0, 100.0))),
        kind=draw(st.sampled_from(KINDS)),
        beta=draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0))),
    )
    if draw(st.booleans()):
        options |= dict(labels=draw(arranged(torch.randint(0, 3, shape[:-1]))), ignore_index=1)
    for backend in use_implementation(implementation):
        check_op(mmk.distillation_loss, student, teacher, backend=backend, **options)
