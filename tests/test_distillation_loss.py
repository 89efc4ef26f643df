"""distillation_loss on every backend and instruction set, and its module."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from environment import DEVICE, HERE
from fusion_cases import allocations, each_dtype, few_dtypes
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.distillation_loss import KINDS
from mmkernels.testing import check_op, same_bits

each_kind = pytest.mark.parametrize("kind", KINDS)

SHAPES: dict[str, tuple[int, ...]] = {
    "odd": (9, 37),
    "whole vectors": (20, 256),
    "a vocabulary": (5, 3001),
    "one class": (4, 1),
    "sequences": (2, 3, 19),
    "one row": (11,),
    "no rows": (0, 5),
    "no classes": (4, 0),
}


def logits(
    *shape: int, dtype: torch.dtype = torch.float32, gain: float = 3.0, needs_grad: bool = True
) -> tuple[Tensor, Tensor]:
    """Of a student, which requires grad, and of a teacher."""
    student, teacher = ((torch.randn(shape) * gain).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(needs_grad)


def logits_of_excluded_classes(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Classes excluded by both, or by the one that may be without an infinite divergence; of the jsd whole rows."""
    student, teacher = (x.detach() for x in logits(12, 45, dtype=dtype))
    both = torch.rand(12, 45) < 0.2
    student[both], teacher[both] = -torch.inf, -torch.inf
    if kind != "forward_kl":
        student[torch.rand(12, 45) < 0.1] = -torch.inf
    if kind != "reverse_kl":
        teacher[torch.rand(12, 45) < 0.1] = -torch.inf
    if kind == "jsd":
        student[2], teacher[3] = -torch.inf, -torch.inf
    return student.requires_grad_(), teacher.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@each_kind
@each_dtype
def test_loss_and_gradients(shape: str, kind: str, dtype: torch.dtype, backend: str) -> None:
    size = SHAPES[shape]
    for (temperature, beta), needs_grad in zip(((1.0, 0.5), (2.0, 0.1), (4.0, 0.9)), (True, False, True), strict=True):
        options: dict[str, Any] = dict(temperature=temperature, kind=kind, beta=beta)
        if temperature == 4:
            options |= dict(labels=torch.randint(0, 3, size[:-1]), ignore_index=1)
        check_op(mmk.distillation_loss, *logits(*size, dtype=dtype, needs_grad=needs_grad), backend=backend, **options)


@each_kind
@pytest.mark.parametrize(("temperature", "gain"), [(0.01, 0.03), (100.0, 3.0), (100.0, 1e-2), (1.0, 1e-3), (7.0, 1e3)])
def test_any_temperature(kind: str, temperature: float, gain: float, backend: str) -> None:
    check_op(mmk.distillation_loss, *logits(20, 300, gain=gain), temperature=temperature, kind=kind, backend=backend)


@each_kind
def test_large_logits_stay_finite(kind: Any, backend: str) -> None:
    for temperature in (0.01, 1.0, 100.0):
        student, teacher = logits(6, 40, gain=1e4)
        loss = mmk.distillation_loss(student, teacher, temperature=temperature, kind=kind)
        with mmk.use_backend("reference"):
            wide = mmk.distillation_loss(student.double(), teacher.double(), temperature=temperature, kind=kind)
        torch.testing.assert_close(loss.double(), wide, rtol=1e-5, atol=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (student, teacher)))


@each_kind
@few_dtypes
def test_excluded_classes_have_probability_and_gradient_0(kind: Any, dtype: torch.dtype, backend: str) -> None:
    leaves = logits_of_excluded_classes(kind, dtype)
    check_op(mmk.distillation_loss, *leaves, kind=kind, temperature=2.0, backend=backend)
    loss = mmk.distillation_loss(*leaves, kind=kind, temperature=2.0)
    assert loss.isfinite()
    for x, g in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert g.isfinite().all() and not g[x == -torch.inf].any()


def test_a_divergence_is_infinite_where_one_excludes_what_the_other_allows(backend: str) -> None:
    student, teacher = (x.detach() for x in logits(4, 20))
    barred = student.clone()
    barred[1, 3] = -torch.inf
    assert mmk.distillation_loss(barred, teacher, kind="forward_kl") == math.inf
    assert mmk.distillation_loss(student, barred, kind="reverse_kl") == math.inf
    assert mmk.distillation_loss(barred, teacher, kind="jsd").isfinite()


@each_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_ignored_rows_are_never_read(kind: Any, dtype: torch.dtype, backend: str) -> None:
    student, teacher = (x.detach() for x in logits(9, 30))
    labels = torch.randint(0, 3, (9,)).to(dtype)
    labels[4] = 2
    results = []
    for filler in (0.0, math.nan, math.inf):
        leaves = [x.masked_fill((labels == 2)[:, None], filler).requires_grad_() for x in (student, teacher)]
        loss = mmk.distillation_loss(leaves[0], leaves[1], kind=kind, labels=labels, ignore_index=2)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    kept = labels != 2
    torch.testing.assert_close(results[0][0], mmk.distillation_loss(student[kept], teacher[kept], kind=kind))
    assert not results[0][1][~kept].any()


@each_kind
def test_no_row_that_counts_gives_0_with_gradient_0(kind: Any, backend: str) -> None:
    for rows in (0, 5):
        student, teacher = logits(rows, 7)
        loss = mmk.distillation_loss(student, teacher, kind=kind, labels=torch.full((rows,), -100))
        assert loss == 0
        assert all(not g.any() for g in torch.autograd.grad(loss, (student, teacher)))


def test_the_reference_is_the_written_out_formula() -> None:
    student, teacher = (x.detach().double() for x in logits(6, 5))
    t, s = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    m = 0.3 * t + 0.7 * s

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum(-1).mean()

    expected: dict[Any, Tensor] = {
        "forward_kl": kl(t, s),
        "reverse_kl": kl(s, t),
        "jsd": 0.3 * kl(t, m) + 0.7 * kl(s, m),
    }
    for kind, want in expected.items():
        got = mmk.distillation_loss(student, teacher, temperature=3.0, kind=kind, beta=0.3)
        torch.testing.assert_close(got, 9 * want)
    torch_own = 9 * F.kl_div((student / 3).log_softmax(-1), t, reduction="batchmean")
    torch.testing.assert_close(mmk.distillation_loss(student, teacher, temperature=3.0), torch_own)


@each_kind
def test_at_the_ends_of_beta_the_jsd_is_0(kind: Any, backend: str) -> None:
    student, teacher = logits(5, 12)
    for beta in (0.0, 1.0, 0, 1):
        loss = mmk.distillation_loss(student, teacher, kind="jsd", beta=beta)
        assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def test_nothing_of_the_logits_size_but_the_gradient_is_made(native_isa: str) -> None:
    student, teacher = logits(64, 4000, needs_grad=False)
    size = student.numel() * 4

    def run() -> None:
        mmk.distillation_loss(student, teacher, temperature=2.0, kind="jsd").backward()

    assert sum(n >= size // 4 for n in allocations(run)) == 1


def function_of(kind: Any, with_labels: bool = False) -> contract.Function:
    def function(student: Tensor, teacher: Tensor) -> Tensor:
        labels = (torch.arange(student.shape[0], device=student.device) % 3) if with_labels else None
        return mmk.distillation_loss(
            student, teacher, temperature=2.0, kind=kind, beta=0.3, labels=labels, ignore_index=1
        )

    return function


def leaves_of(rows: int = 7) -> list[Tensor]:
    return list(logits(rows, 19))


def test_under_autocast_the_loss_is_made_in_float32() -> None:
    student, teacher = logits(5, 9, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = mmk.distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert agree([loss], [mmk.distillation_loss(student.float(), teacher.float())])
    assert torch.autograd.grad(loss, student)[0].dtype == torch.bfloat16


x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
BAD: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "student: expected a torch.Tensor; got list", [x], {}),
    (TypeError, "student: expected dtype float32", x.int(), {}),
    (ValueError, "student: expected at least 1 dim (…, V); got a scalar", x[0, 0], {}),
    (ValueError, "teacher: expected shape (1, 3); got (2, 3)", x[:1], {}),
    (TypeError, "teacher: expected the dtype of student, torch.float16", x.half(), {}),
    (ValueError, "labels: expected shape (2,); got (2, 1)", x, dict(labels=y[:, None])),
    (TypeError, "labels: expected an integer dtype; got torch.float32", x, dict(labels=y.float())),
    (TypeError, "labels: expected an integer dtype; got torch.bool", x, dict(labels=y > 0)),
    (RuntimeError, f"labels: expected the device of student, {HERE}; got meta", x, dict(labels=y.to("meta"))),
    (ValueError, "temperature: expected a finite number above 0; got 0.0", x, dict(temperature=0.0)),
    (ValueError, "temperature: expected a finite number above 0; got nan", x, dict(temperature=math.nan)),
    (ValueError, "temperature: expected a finite number above 0; got inf", x, dict(temperature=math.inf)),
    (TypeError, "temperature: expected a number; got str", x, dict(temperature="1")),
    (ValueError, "beta: expected a number in 0 … 1; got 1.5", x, dict(beta=1.5)),
    (ValueError, "kind: expected one of forward_kl, reverse_kl, jsd; got 'kl'", x, dict(kind="kl")),
    (TypeError, "ignore_index: expected an int; got float", x, dict(ignore_index=0.5)),
]


@pytest.mark.parametrize(("error", "message", "student", "options"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, student: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^distillation_loss: " + re.escape(message)):
        mmk.distillation_loss(student, x, **options)


def test_numbers_of_any_kind_are_taken() -> None:
    student, teacher = logits(4, 6)
    expected = mmk.distillation_loss(student, teacher, temperature=2.0, kind="jsd", beta=0.25)
    for number, beta in itertools.product((2, torch.tensor(2)), (0.25, torch.tensor(0.25))):
        assert torch.equal(mmk.distillation_loss(student, teacher, temperature=number, kind="jsd", beta=beta), expected)  # type: ignore[arg-type]


@each_kind
def test_the_module_is_the_op(kind: Any) -> None:
    criterion = mmk.nn.DistillationLoss(temperature=2, kind=kind, beta=0.3, ignore_index=1)
    student, teacher = logits(6, 8)
    labels = torch.arange(6) % 3
    expected = function_of(kind)(student, teacher)
    assert torch.equal(criterion(student, teacher), expected)
    assert torch.equal(criterion(student, teacher, labels), function_of(kind, True)(student, teacher))
    assert repr(criterion) == f"DistillationLoss(temperature=2, kind={kind!r}, beta=0.3)"
    with pytest.raises(ValueError, match=r"^DistillationLoss: temperature: expected a finite number"):
        mmk.nn.DistillationLoss(temperature=0.0)
