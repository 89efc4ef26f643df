"""The contrastive losses in Triton: a part of the ordinary tests that the interpreter has time for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import each_dtype
from op_contract import check_every_element_is_written, gradients
from torch import Tensor

import mmkernels as mmk
from mmkernels import _triton
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op
from mmkernels.testing import check_op, same_bits

pytestmark = pytest.mark.usefixtures("triton_backend")

if _triton.absent() is None:
    from mmkernels.triton.contrastive import strips


def pairs(
    n: int = 150, features: int = 70, dtype: torch.dtype = torch.float32, others: int | None = None
) -> list[Tensor]:
    """x [n, D] and y [others, D], normalised."""
    rows = (n, n if others is None else others)
    return [F.normalize(torch.randn(r, features), dim=-1).to(dtype).requires_grad_() for r in rows]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def in_small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every strip has 128 rows."""
    from mmkernels.ops.contrastive_loss import kernel_triton as contrastive
    from mmkernels.ops.sigmoid_contrastive_loss import kernel_triton as sigmoid

    monkeypatch.setattr(contrastive, "_STATISTICS_PAIRS", 1)
    monkeypatch.setattr(contrastive, "SLOPE_PAIRS", 1)
    monkeypatch.setattr(sigmoid, "SLOPE_PAIRS", 1)


SIZES = [(150, 70), (1, 3), (0, 8), (70, 0)]


@pytest.mark.parametrize("n,features", SIZES)
@each_dtype
def test_contrastive_loss(n: int, features: int, dtype: torch.dtype) -> None:
    check_op(mmk.contrastive_loss, *pairs(n, features, dtype), scalar(30.0), backend="triton")
    labels = torch.randint(0, max(n // 3, 1), (n,), dtype=torch.int32)
    options: dict[str, Any] = dict(labels=labels, label_smoothing=0.1)
    check_op(mmk.contrastive_loss, *pairs(n, features, dtype), scalar(30.0), backend="triton", **options)


@pytest.mark.parametrize("n,features", SIZES)
@each_dtype
def test_sigmoid_contrastive_loss(n: int, features: int, dtype: torch.dtype) -> None:
    check_op(mmk.sigmoid_contrastive_loss, *pairs(n, features, dtype), scalar(30.0), scalar(-8.0), backend="triton")


@pytest.mark.parametrize("scale", [100.0, 1e4, 0.0])
def test_large_logits_and_none(scale: float) -> None:
    x, y = pairs(64, 16)
    near = (x + 0.1 * y).detach().requires_grad_()
    check_op(mmk.contrastive_loss, x, near, scalar(scale), backend="triton")
    check_op(mmk.contrastive_loss, x, y, scalar(scale), label_smoothing=0.2, backend="triton")
    check_op(mmk.sigmoid_contrastive_loss, x, near, scalar(scale), scalar(-10.0), backend="triton")


@pytest.mark.parametrize("first", [0, 90])
@each_dtype
def test_rows_against_more_columns(first: int, dtype: torch.dtype) -> None:
    x, y = pairs(60, 33, dtype, others=150)
    columns = torch.randint(0, 40, (150,))
    rows = columns[first : first + 60]

    def rows_alone(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss_op(x, y, scale, None, None, 0.0, False, first, 150, False)[0]

    def labelled(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss_op(x, y, scale, rows, columns, 0.1, False, first, 150, False)[0]

    def sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return sigmoid_contrastive_loss_op(x, y, scale, bias, first, 150, True, True)[0]

    check_op(rows_alone, x, y, scalar(20.0), backend="triton")
    check_op(labelled, x, y, scalar(20.0), backend="triton")
    check_op(sigmoid, x, y, scalar(20.0), scalar(-5.0), backend="triton")


@each_dtype
def test_strips_of_rows_are_put_together(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_strips(monkeypatch)
    assert [s.stop for s in strips(300, 300, 33, 1)] == [128, 256, 300]
    labels = torch.randint(0, 100, (300,))
    check_op(mmk.contrastive_loss, *pairs(300, 33, dtype), scalar(20.0), backend="triton")
    check_op(mmk.contrastive_loss, *pairs(300, 33, dtype), scalar(20.0), labels=labels, backend="triton")
    check_op(mmk.sigmoid_contrastive_loss, *pairs(300, 33, dtype), scalar(20.0), scalar(-9.0), backend="triton")


def test_small_slopes_survive_in_float16() -> None:
    """All negatives are alike: each slope is 1 / N or less, and they count together."""
    x, y = (torch.ones(1, 16).expand(2100, 16).half() * 0.25 for _ in range(2))
    leaves = [x[:64].clone().requires_grad_(), y.clone().requires_grad_()]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return sigmoid_contrastive_loss_op(x, y, torch.tensor(1.0), torch.tensor(-16.0), 0, 1, True, True)[0]

    check_op(loss, *leaves, backend="triton")


def test_every_element_is_written_and_the_bits_repeat() -> None:
    x, y = pairs(100, 20)
    scale, bias = scalar(10.0), scalar(-5.0)
    check_every_element_is_written(mmk.contrastive_loss, [x, y, scale])
    check_every_element_is_written(mmk.sigmoid_contrastive_loss, [x, y, scale, bias])
    for loss, leaves in ((mmk.contrastive_loss, [x, y, scale]), (mmk.sigmoid_contrastive_loss, [x, y, scale, bias])):
        first, again = ([x.flatten() for x in gradients(loss, leaves)] for _ in range(2))
        assert same_bits(first, again)


def test_each_gradient_alone_and_rows_that_lie_otherwise_in_memory() -> None:
    wide = [torch.randn(2, 50, 24).transpose(0, 1)[:, 0] for _ in range(2)]
    for i in range(4):
        leaves = [
            x.detach().requires_grad_(i == j) for j, x in enumerate((*wide, torch.tensor(3.0), torch.tensor(1.0)))
        ]
        if i < 3:
            check_op(mmk.contrastive_loss, *leaves[:3], backend="triton")
        check_op(mmk.sigmoid_contrastive_loss, *leaves, backend="triton")
