"""multimodal_cross_entropy in Triton: a part of the ordinary tests that the interpreter has time for.

``MMKERNELS_BACKEND=triton`` runs all of the op's tests on Triton.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fusion_cases import each_dtype, few_dtypes
from heads_in_chunks import use_small_chunks
from op_contract import check_each_gradient_alone, check_every_element_is_written
from row_ops import strided
from test_multimodal_cross_entropy import LOSSES, each_loss, flags, leaves_of, losses, make, numbers
from test_multimodal_cross_entropy_linear import make as make_heads

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory

pytestmark = pytest.mark.usefixtures("triton_backend")


@each_loss
@each_dtype
def test_losses_and_gradients(loss: str, dtype: torch.dtype) -> None:
    logits, labels = make(dtype, batch=7)
    logits = [strided(z) for z in logits]
    options: dict[str, Any] = dict(modulation=numbers(dtype), presence=flags(7), **LOSSES[loss])
    with poisoned_memory():
        check_op(mmk.multimodal_cross_entropy, logits, labels, backend="triton", weights=numbers(dtype), **options)
        check_op(mmk.multimodal_cross_entropy, logits, labels, backend="triton", log_vars=numbers(), **LOSSES[loss])


@each_loss
def test_rows_of_several_blocks(loss: str) -> None:
    logits, labels = make(batch=3, classes=(9001, 4096), gain=100.0)
    check_op(mmk.multimodal_cross_entropy, logits, labels, backend="triton", **LOSSES[loss])


@each_loss
def test_what_is_not_valid_or_impossible(loss: str) -> None:
    logits, labels = make(classes=(40,))
    labels = torch.where(labels == -100, labels, labels % 3)
    with torch.no_grad():
        logits[0][:, 3:20] = -math.inf
        logits[0][labels == -100] = math.nan
    check_op(mmk.multimodal_cross_entropy, logits, labels, backend="triton", **LOSSES[loss])
    nothing = torch.full_like(labels, -100)
    total, _ = mmk.multimodal_cross_entropy(logits, nothing, **LOSSES[loss])
    assert total == 0 and torch.autograd.grad(total, logits)[0].eq(0).all()


def test_in_memory_and_with_partial_gradients() -> None:
    check_every_element_is_written(losses, leaves_of())
    check_each_gradient_alone(losses, leaves_of())


@each_loss
@few_dtypes
def test_heads(loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_chunks(monkeypatch)
    hidden, heads, labels = make_heads(dtype)

    def call(x: Any, w: Any, b: Any, **options: Any) -> Any:
        return mmk.multimodal_cross_entropy([x], labels, linear=[(w, b)], **options)

    check_op(call, hidden[0], *heads[0], backend="triton", presence=torch.rand(9, 1) < 0.7, **LOSSES[loss])


def test_what_is_left_to_other_backends() -> None:
    with pytest.raises(mmk.UnsupportedError, match="logits of no classes"):
        mmk.multimodal_cross_entropy([torch.zeros(2, 0)], torch.full((2,), -100))
