"""distillation_loss of hidden states and heads: the loss and gradients of the logits that it never holds."""

from __future__ import annotations

import math
import re
from typing import Any

import op_contract as contract
import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from environment import DEVICE
from fusion_cases import allocations, each_dtype, few_dtypes
from heads_in_chunks import CONTRACT, peak_bytes, use_small_chunks
from test_distillation_loss import each_kind
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops import _linear_loss as chunks
from mmkernels.testing import check_op, poisoned_memory, same_bits

CLASSES = 33


def make(
    dtype: torch.dtype = torch.float32,
    lead: tuple[int, ...] = (9,),
    classes: int = CLASSES,
    widths: tuple[int, int] = (7, 10),
    frozen: bool = False,
) -> list[Tensor]:
    """Hidden states, weight and bias of a student; hidden states and weight of a teacher, which may be frozen."""
    of_student, of_teacher = widths
    shapes = ((*lead, of_student), (classes, of_student), (classes,), (*lead, of_teacher), (classes, of_teacher))
    return [torch.randn(s).to(dtype).requires_grad_(i < 3 or not frozen) for i, s in enumerate(shapes)]


def loss_of(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, other: Tensor, **options: Any) -> Tensor:
    return mmk.distillation_loss(student, teacher, linear=[(weight, bias), (other, None)], **options)


def of_logits(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, other: Tensor, **options: Any) -> Tensor:
    return mmk.distillation_loss(F.linear(student, weight, bias), F.linear(teacher, other), **options)


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"], autouse=True)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        use_small_chunks(monkeypatch)


@pytest.mark.parametrize("frozen", [False, True], ids=["teacher learns", "teacher is frozen"])
@each_kind
@each_dtype
def test_loss_and_gradients(kind: str, dtype: torch.dtype, frozen: bool, either_backend: str) -> None:
    labels = torch.randint(0, 3, (9,))
    for temperature, beta, given in ((1.0, 0.5, None), (3.0, 0.1, labels)):
        options: dict[str, Any] = dict(temperature=temperature, kind=kind, beta=beta, labels=given, ignore_index=1)
        with poisoned_memory():
            check_op(loss_of, *make(dtype, frozen=frozen), backend=either_backend, **options)


@each_kind
def test_it_is_the_call_on_logits(kind: str, either_backend: str) -> None:
    leaves = make(lead=(4, 11))
    labels = torch.randint(0, 3, (4, 11))
    for temperature in (0.1, 1.0, 10.0):
        options: dict[str, Any] = dict(kind=kind, temperature=temperature, beta=0.3, labels=labels, ignore_index=1)
        losses = [loss_of(*leaves, **options), of_logits(*leaves, **options)]
        torch.testing.assert_close(losses[0], losses[1])
        pulled = [torch.autograd.grad(3 * loss, leaves) for loss in losses]
        torch.testing.assert_close(pulled[0], pulled[1], rtol=1e-4, atol=1e-5)


def liger_jsd(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """Of every row, as in liger-kernel's LigerFusedLinearJSDLoss (chunked_loss/jsd_loss.py): without T², and with the
    two divergences at the ends of beta."""
    log_s, log_t = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    options: dict[str, Any] = dict(reduction="none", log_target=True)
    if beta == 0:
        return F.kl_div(log_s, log_t, **options).sum(-1)
    if beta == 1:
        return F.kl_div(log_t, log_s, **options).sum(-1)
    log_m = torch.logsumexp(torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), 0)
    of_teacher, of_student = F.kl_div(log_m, log_t, **options), F.kl_div(log_m, log_s, **options)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_it_is_ligers_fused_linear_jsd_times_the_temperature_squared(beta: float, either_backend: str) -> None:
    student, weight, bias, teacher, other = leaves = make(frozen=True)
    labels = torch.tensor([0, -100, 0, 1, 1, -100, 1, 0, 0])
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    for temperature in (1.0, 2.5):
        loss = loss_of(*leaves, kind=kind, beta=beta, temperature=temperature, labels=labels)
        rows = liger_jsd(F.linear(student, weight, bias), F.linear(teacher, other), temperature, beta)
        want = temperature**2 * rows[labels != -100].mean()
        torch.testing.assert_close(loss, want)
        for got, expected in zip(
            torch.autograd.grad(loss, leaves[:3]), torch.autograd.grad(want, leaves[:3]), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_one_row_without_leading_dims(either_backend: str) -> None:
    leaves = make(lead=())
    torch.testing.assert_close(loss_of(*leaves), of_logits(*leaves))


@each_kind
@few_dtypes
def test_ignored_rows_are_never_read(kind: str, dtype: torch.dtype, either_backend: str) -> None:
    leaves = make(dtype)
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 0])
    results = []
    for filler in (0.0, math.nan, math.inf):
        given = [x.detach().clone() for x in leaves]
        for hidden in (given[0], given[3]):
            hidden[labels == 1] = filler
        given = [x.requires_grad_() for x in given]
        loss = loss_of(*given, kind=kind, labels=labels, ignore_index=1)
        results.append([loss, *torch.autograd.grad(loss, given)])
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    assert all(g.isfinite().all() for g in results[1])
    assert all(results[1][i][labels == 1].eq(0).all() for i in (1, 4))


@each_kind
def test_no_row_that_counts_gives_0_with_gradient_0(kind: str, either_backend: str) -> None:
    for rows in (0, 5):
        leaves = make(lead=(rows,))
        loss = loss_of(*leaves, kind=kind, labels=torch.full((rows,), -100))
        assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("empty", ["rows", "width", "classes"])
@each_kind
def test_sizes_of_zero(empty: str, kind: str, either_backend: str) -> None:
    sizes: dict[str, Any] = {"rows": dict(lead=(0,)), "width": dict(widths=(0, 3)), "classes": dict(classes=0)}[empty]
    leaves = make(**sizes)
    loss = loss_of(*leaves, kind=kind)
    torch.testing.assert_close(loss, of_logits(*leaves, kind=kind))
    for grad, leaf in zip(torch.autograd.grad(loss, leaves), leaves, strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()


@each_kind
def test_at_the_ends_of_beta_the_jsd_is_0(kind: str, either_backend: str) -> None:
    leaves = make()
    for beta in (0.0, 1.0):
        loss = loss_of(*leaves, kind="jsd", beta=beta)
        assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, leaves))


@each_kind
def test_a_class_excluded_by_its_bias_has_gradient_0(kind: str, either_backend: str) -> None:
    student, weight, _, teacher, other = make()
    bias = torch.randn(CLASSES)
    bias[3] = -torch.inf
    leaves = [x.detach().requires_grad_() for x in (student, weight, bias, teacher, other)]

    def call(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, other: Tensor) -> Tensor:
        return mmk.distillation_loss(student, teacher, linear=[(weight, bias), (other, bias)], kind=kind)  # type: ignore[arg-type]

    loss = call(*leaves)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert all(g[3].eq(0).all() for g in (grads[1], grads[2], grads[4]))


def test_any_strides(either_backend: str) -> None:
    leaves = [x.detach() for x in make(lead=(4, 3))]
    arranged = [x.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in leaves]
    check_op(loss_of, *arranged, backend=either_backend, kind="jsd")


def function_of(kind: Any) -> contract.Function:
    def function(*leaves: Tensor) -> Tensor:
        labels = torch.arange(leaves[0].shape[0], device=leaves[0].device) % 3
        return loss_of(*leaves, kind=kind, temperature=2.0, beta=0.3, labels=labels, ignore_index=1)

    return function


def leaves_of(rows: int = 9) -> list[Tensor]:
    torch.manual_seed(3)
    return make(lead=(rows,), classes=6, widths=(3, 4))


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(check: str, either_backend: str) -> None:
    CONTRACT[check](function_of("jsd"), leaves_of())


@each_kind
def test_it_compiles_and_exports(kind: str, either_backend: str) -> None:
    contract.check_compile(function_of(kind), leaves_of)

    def hidden_first(rows: int) -> list[Tensor]:
        student, weight, bias, teacher, other = leaves_of(rows)
        return [student, teacher, weight, bias, other]

    def call(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
        return loss_of(student, weight, bias, teacher, other, kind=kind)

    contract.check_export(call, hidden_first, 2)


@each_kind
def test_second_order(kind: str) -> None:
    contract.check_second_order(function_of(kind), [x.detach() / 2 for x in leaves_of(4)])


def test_hidden_states_and_heads_are_cast_under_autocast(either_backend: str) -> None:
    leaves = make()
    want = loss_of(*(x.bfloat16() for x in leaves))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = loss_of(*leaves)
    assert loss.dtype == torch.float32 and want.dtype == torch.bfloat16
    torch.testing.assert_close(loss.bfloat16(), want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))


def test_the_module_takes_heads_too(either_backend: str) -> None:
    student, weight, bias, teacher, other = make()
    labels = torch.arange(9) % 3
    criterion = mmk.nn.DistillationLoss(temperature=2, kind="jsd", beta=0.3, ignore_index=1)
    got = criterion(student, teacher, labels, linear=[(weight, bias), (other, None)])
    assert torch.equal(got, function_of("jsd")(student, weight, bias, teacher, other))


@native_only
def test_a_frozen_teacher_and_head_cost_nothing_but_logits(chunked: None) -> None:
    student, weight, _, teacher, other = make(lead=(64,), classes=20000, widths=(32, 32))
    weight, other, teacher = weight.detach(), other.detach(), teacher.detach()
    made: list[Tensor] = []

    def run() -> None:
        loss = mmk.distillation_loss(student, teacher, linear=[(weight, None), (other, None)])
        made.extend(torch.autograd.grad(loss, student))

    buffer = chunks._chunk_rows(64, 20000, 4) * 20000 * 4  # in one chunk there are both logits and one gradient
    assert sum(n for n in allocations(run) if n >= weight.nbytes // 2) <= 3 * buffer


@native_only
def test_the_logits_are_never_in_memory() -> None:
    hidden, head = ("rows", "width"), ("classes", "width")
    loss = "lambda _, s, W, b, t, U: mmk.distillation_loss(s, t, linear=[(W, b), (U, None)], kind='jsd')"
    assert peak_bytes(loss, [hidden, head, ("classes",), hidden, head]) < 120 << 20


h, t, w, u = torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(5, 3), torch.zeros(5, 2)
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "linear: expected a list of pairs (weight, bias or None); got Tensor", dict(linear=w)),
    (ValueError, "linear: expected 2 heads, one for each of student and teacher; got 1", dict(linear=[(w, None)])),
    (TypeError, "linear[1]: expected a pair (weight, bias or None); got Tensor", dict(linear=[(w, None), u])),
    (TypeError, "linear[0][0]: expected a torch.Tensor; got NoneType", dict(linear=[(None, None), (u, None)])),
    (ValueError, "linear[1][0]: expected shape (C, 2); got (5, 3)", dict(linear=[(w, None), (w, None)])),
    (ValueError, "linear[1][0]: expected 5 classes, as many as linear[0][0]", dict(linear=[(w, None), (u[1:], None)])),
    (TypeError, "linear[1][0]: expected the dtype of student", dict(linear=[(w, None), (u.half(), None)])),
    (ValueError, "linear[0][1]: expected shape (5,); got (3,)", dict(linear=[(w, h[0]), (u, None)])),
    (ValueError, "teacher: expected shape (4, D), the leading dims of student; got (3, 2)", dict(teacher=t[:3])),
    (TypeError, "teacher: expected the dtype of student, torch.float32", dict(teacher=t.half())),
    (ValueError, "student: expected at least 1 dim (…, D); got a scalar", dict(student=h[0, 0])),
    (ValueError, "labels: expected shape (4,); got (3,)", dict(labels=torch.zeros(3, dtype=torch.long))),
    (ValueError, "temperature: expected a finite number above 0; got 0.0", dict(temperature=0.0)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = dict(student=h, teacher=t, linear=[(w, None), (u, None)]) | changed
    with pytest.raises(error, match=re.escape(f"distillation_loss: {message}")):
        mmk.distillation_loss(**given)
