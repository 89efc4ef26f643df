"""decision_fusion and distillation_loss in Triton: a part of the ordinary tests that the interpreter has time for.

``MMKERNELS_BACKEND=triton`` runs all tests of both on Triton.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fusion_cases import each_dtype, few_dtypes, spoiled
from heads_in_chunks import use_small_chunks
from op_contract import check_each_gradient_alone, check_every_element_is_written, check_strides, gradients
from test_decision_fusion import classifiers, fused, weights_of
from test_decision_fusion import leaves_of as fused_leaves
from test_distillation_loss import function_of, logits, logits_of_excluded_classes
from test_distillation_loss import leaves_of as distilled_leaves
from test_distillation_loss_linear import loss_of as loss_of_heads
from test_distillation_loss_linear import make as heads

import mmkernels as mmk
from mmkernels.ops.decision_fusion import METHODS
from mmkernels.ops.distillation_loss import KINDS
from mmkernels.testing import check_op, same_bits

pytestmark = pytest.mark.usefixtures("triton_backend")

each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_method
@each_dtype
def test_decision_fusion(method: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(method=method, backend="triton", grad=method != "vote")
    presence = torch.rand(37, 4) > 0.4
    presence[3] = False
    for of_rows in (None, 37):
        excluded = classifiers(37, 4, 70, dtype, excluded=0.2)
        check_op(mmk.decision_fusion, excluded, weights_of(of_rows, 4, dtype), presence=presence, **options)
    with torch.no_grad():
        weights = weights_of(None, 2, dtype)
        weights[0] = 0
    check_op(mmk.decision_fusion, classifiers(3, 2, 1500, dtype, excluded=0.2), weights, **options)
    check_op(mmk.decision_fusion, classifiers(5, 2, 1, dtype), **options)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_decision_fusion_in_memory_and_with_partial_gradients(method: str) -> None:
    if method in ("mean", "log"):
        check_each_gradient_alone(fused(method), fused_leaves())
    check_every_element_is_written(fused(method), fused_leaves())
    check_strides(fused(method), fused_leaves())
    assert same_bits(gradients(fused(method), leaves := fused_leaves(90)), gradients(fused(method), leaves))


@each_method
def test_decision_fusion_does_not_read_an_absent_modality(method: Any) -> None:
    presence = torch.rand(9, 3) > 0.4
    presence[:, 0], presence[1] = False, False
    sources, given = classifiers(9, 3, 21), weights_of(9, 3).detach()
    results = []
    for filler in (0.0, math.nan):
        leaves, weights = spoiled(sources, presence, filler), given.masked_fill(~presence, filler).requires_grad_()
        out = mmk.decision_fusion(leaves, weights, method=method, presence=presence)
        wanted = [*leaves, weights]
        results.append([out.detach()] if method == "vote" else [out, *torch.autograd.grad(out.sin().sum(), wanted)])
    assert same_bits(*results)
    assert all(x.isfinite().all() for x in results[0])


def test_what_decision_fusion_leaves_to_other_backends() -> None:
    with pytest.raises(mmk.UnsupportedError, match="65 modalities are more than the 64"):
        mmk.decision_fusion([torch.zeros(2, 4)] * 65)
    with pytest.raises(mmk.UnsupportedError, match="9000 classes are more than the 8192"):
        mmk.decision_fusion([torch.zeros(2, 9000)])


@each_kind
@each_dtype
def test_distillation_loss(kind: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(kind=kind, backend="triton")
    labels = torch.arange(9) % 3
    check_op(mmk.distillation_loss, *logits(9, 37, dtype=dtype), labels=labels, ignore_index=1, beta=0.1, **options)
    check_op(mmk.distillation_loss, *logits(3, 5000, dtype=dtype), temperature=2.0, **options)
    check_op(mmk.distillation_loss, *logits(5, 300, dtype=dtype, gain=1e-2), temperature=100.0, **options)
    for beta in (0.0, 1.0):
        check_op(mmk.distillation_loss, *logits(2, 3, dtype=dtype), beta=beta, **options)
    check_op(mmk.distillation_loss, *logits_of_excluded_classes(kind, dtype), **options)


@each_kind
def test_distillation_loss_in_memory_and_with_partial_gradients(kind: str) -> None:
    check_every_element_is_written(function_of(kind, True), distilled_leaves())
    check_each_gradient_alone(function_of(kind), distilled_leaves())
    leaves = distilled_leaves(40)
    assert same_bits(gradients(function_of(kind), leaves), gradients(function_of(kind), leaves))


@each_kind
def test_distillation_loss_does_not_read_ignored_rows(kind: Any) -> None:
    student, teacher = (x.detach() for x in logits(9, 30))
    labels = torch.arange(9) % 3
    results = []
    for filler in (0.0, math.nan):
        leaves = [x.masked_fill((labels == 2)[:, None], filler).requires_grad_() for x in (student, teacher)]
        loss = mmk.distillation_loss(leaves[0], leaves[1], kind=kind, labels=labels, ignore_index=2)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert same_bits(*results)
    assert results[0][0].isfinite()


@pytest.mark.parametrize("frozen", [False, True], ids=["teacher learns", "teacher is frozen"])
@each_kind
@few_dtypes
def test_distillation_loss_of_heads(
    kind: str, dtype: torch.dtype, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_chunks(monkeypatch)
    options: dict[str, Any] = dict(backend="triton", kind=kind, temperature=3.0)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 0, 2])
    check_op(loss_of_heads, *heads(dtype, frozen=frozen), labels=labels, ignore_index=1, beta=0.1, **options)
    check_op(loss_of_heads, *heads(dtype, lead=(3,), classes=2000, frozen=frozen), **options)
    check_op(loss_of_heads, *heads(dtype, lead=(2,)), kind="jsd", beta=1.0, backend="triton")


@each_kind
def test_distillation_loss_of_heads_does_not_read_ignored_rows(kind: Any) -> None:
    leaves, labels = heads(), torch.tensor([0, 1, 0, 2, 1, 0, 0, 0, 2])
    results = []
    for filler in (0.0, math.nan):
        given = [
            x.detach().masked_fill((labels == 2)[:, None], filler) if i in (0, 3) else x.detach()
            for i, x in enumerate(leaves)
        ]
        given = [x.requires_grad_() for x in given]
        loss = loss_of_heads(*given, kind=kind, labels=labels, ignore_index=2)
        results.append([loss, *torch.autograd.grad(loss, given)])
    assert same_bits(*results) and all(x.isfinite().all() for x in results[1])
