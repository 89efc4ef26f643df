"""multimodal_cross_entropy of hidden states and heads: the losses and gradients of the logits that it never holds."""

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
from test_multimodal_cross_entropy import LOSSES, each_loss, flags, numbers
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops import _linear_loss as chunks
from mmkernels.testing import check_op, poisoned_memory

Head = tuple[Tensor, Tensor | None]


def make(
    dtype: torch.dtype = torch.float32, batch: int = 9, classes: tuple[int, ...] = (5, 33, 200, 8), width: int = 7
) -> tuple[list[Tensor], list[Head], Tensor]:
    """Hidden states of width, width + 1, … features, heads, every other one with a bias, and labels, some ignored."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    hidden = [leaf(batch, width + i) for i in range(len(classes))]
    heads = [(leaf(c, width + i), leaf(c) if i % 2 == 0 else None) for i, c in enumerate(classes)]
    labels = torch.randint(0, max(min(classes), 1), (batch,))
    labels[1::4] = -100
    return hidden, heads, labels


def leaves_in(hidden: list[Tensor], heads: list[Head]) -> list[Tensor]:
    return [*hidden, *(t for head in heads for t in head if t is not None)]


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"], autouse=True)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        use_small_chunks(monkeypatch)


@each_loss
@each_dtype
def test_losses_and_gradients(loss: str, dtype: torch.dtype, either_backend: str) -> None:
    hidden, heads, labels = make(dtype)

    def call(*leaves: Tensor, **options: Any) -> Any:
        taken = iter(leaves)
        xs = [next(taken) for _ in hidden]
        given = [(next(taken), None if b is None else next(taken)) for _, b in heads]
        return mmk.multimodal_cross_entropy(xs, labels, linear=given, **options)

    leaves = leaves_in(hidden, heads)
    options: dict[str, Any] = dict(modulation=numbers(dtype), presence=flags(), **LOSSES[loss])
    with poisoned_memory():
        check_op(call, *leaves, backend=either_backend, weights=numbers(dtype), **options)
        check_op(call, *leaves, backend=either_backend, log_vars=numbers(), **LOSSES[loss])


def test_it_is_the_call_on_logits(either_backend: str) -> None:
    hidden, heads, labels = make(batch=40)
    logits = [F.linear(x, w, b) for x, (w, b) in zip(hidden, heads, strict=True)]
    leaves, s = leaves_in(hidden, heads), numbers()
    options: dict[str, Any] = dict(log_vars=s, label_smoothing=0.1, presence=flags(40))
    outs = [
        mmk.multimodal_cross_entropy(hidden, labels, linear=heads, **options),
        mmk.multimodal_cross_entropy(logits, labels, **options),
    ]
    torch.testing.assert_close(outs[0], outs[1])
    pulled = [torch.autograd.grad(t + e.square().sum(), [*leaves, s]) for t, e in outs]
    torch.testing.assert_close(pulled[0], pulled[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_it_is_ligers_fused_linear_cross_entropy(smoothing: float, either_backend: str) -> None:
    """liger-kernel (ops/cross_entropy.py): (1 − ε) (lse − z[y]) + ε lse − ε / V Σ z, its gradient softmax − ε / V, less
    1 − ε at the label, both over the rows that count."""
    (hidden,), heads, labels = make(batch=40, classes=(33,))
    weight, bias = heads[0]
    labels = torch.where(labels == -100, labels, torch.randint(0, 33, labels.shape))
    valid = labels != -100
    total, _ = mmk.multimodal_cross_entropy([hidden], labels, linear=heads, label_smoothing=smoothing)
    z, y = F.linear(hidden, weight, bias)[valid].detach(), labels[valid]
    lse = z.logsumexp(1)
    of_label = z.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(
        total, ((1 - smoothing) * (lse - of_label) + smoothing * lse - smoothing / 33 * z.sum(1)).mean()
    )
    dz = (z.softmax(1) - smoothing / 33 - (1 - smoothing) * F.one_hot(y, 33)) / valid.sum()
    of_hidden, of_weight, of_bias = torch.autograd.grad(total, leaves_in([hidden], heads))
    torch.testing.assert_close(of_hidden[valid], dz @ weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_weight, dz.T @ hidden[valid], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_bias, dz.sum(0), rtol=1e-4, atol=1e-6)


@few_dtypes
def test_hidden_states_that_are_not_valid_are_not_read(dtype: torch.dtype, either_backend: str) -> None:
    hidden, heads, labels = make(dtype)
    presence = flags()
    valid = presence & (labels != -100)[:, None]
    spoiled = [torch.where(valid[:, i : i + 1], x.detach(), math.nan).requires_grad_() for i, x in enumerate(hidden)]
    for total, xs in (
        (mmk.multimodal_cross_entropy(xs, labels, presence=presence, linear=heads)[0], xs) for xs in (hidden, spoiled)
    ):
        assert total.isfinite()
        grads = torch.autograd.grad(total, leaves_in(xs, heads))
        assert all(g.isfinite().all() for g in grads)
        assert all(g[~valid[:, i]].eq(0).all() for i, g in enumerate(grads[: len(xs)]))


def test_without_valid_rows_loss_and_gradients_are_zero(either_backend: str) -> None:
    hidden, heads, labels = make()
    s = numbers()
    total, each = mmk.multimodal_cross_entropy(hidden, torch.full_like(labels, -100), log_vars=s, linear=heads)
    assert total == 0 and each.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(total + each.sum(), [*leaves_in(hidden, heads), s]))


@pytest.mark.parametrize("empty", ["batch", "width", "classes"])
def test_sizes_of_zero(empty: str, either_backend: str) -> None:
    sizes = {"batch": 9, "width": 7, "classes": (5,)} | {empty: (0,) if empty == "classes" else 0}
    hidden, heads, labels = make(**sizes)  # type: ignore[arg-type]
    if empty == "classes":
        labels = torch.full_like(labels, -100)
    total, _ = mmk.multimodal_cross_entropy(hidden[:1], labels, linear=heads[:1])
    want = mmk.multimodal_cross_entropy([F.linear(hidden[0], *heads[0])], labels)[0]
    torch.testing.assert_close(total, want)
    for grad, leaf in zip(torch.autograd.grad(total, leaves_in(hidden, heads)), leaves_in(hidden, heads), strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()


def losses(x: Tensor, w: Tensor, b: Tensor, u: Tensor, s: Tensor) -> Tensor:
    labels = torch.tensor([0, 1, -100, 2, 3, 0, 1, 2, 3])[: x.shape[0]]
    total, each = mmk.multimodal_cross_entropy([x, x], labels, log_vars=s, linear=[(w, b), (u, None)])
    return torch.cat([total.unsqueeze(0), each])


def leaves_of(batch: int = 9) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = ((batch, 6), (5, 6), (5,), (7, 6), (2,))
    return [torch.randn(s).requires_grad_() for s in shapes]


@pytest.mark.parametrize("check", CONTRACT)
def test_contract(check: str, either_backend: str) -> None:
    CONTRACT[check](losses, leaves_of())


def test_it_compiles_and_exports(either_backend: str) -> None:
    contract.check_compile(losses, leaves_of)

    def of_labels(*x: Tensor) -> Tensor:
        return mmk.multimodal_cross_entropy([x[0]], x[0][:, :5].argmax(1), linear=[(x[1], x[2])])[0]

    contract.check_export(of_labels, lambda batch: leaves_of(batch)[:3], 1)


def test_second_order() -> None:
    contract.check_second_order(losses, leaves_of(4))


def test_heads_are_cast_under_autocast(either_backend: str) -> None:
    hidden, heads, labels = make()
    halves = [(w.bfloat16(), None if b is None else b.bfloat16()) for w, b in heads]
    want = mmk.multimodal_cross_entropy([x.bfloat16() for x in hidden], labels, linear=halves)[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        total, _ = mmk.multimodal_cross_entropy(hidden, labels, linear=heads)
    assert total.dtype == torch.float32 and want.dtype == torch.bfloat16
    torch.testing.assert_close(total.bfloat16(), want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(total, leaves_in(hidden, heads)))


@native_only
def test_a_frozen_head_costs_nothing(chunked: None) -> None:
    hidden, labels = torch.randn(64, 32, requires_grad=True), torch.randint(0, 20000, (64,))
    weight = torch.randn(20000, 32)
    made: list[Tensor] = []

    def run() -> None:
        total, _ = mmk.multimodal_cross_entropy([hidden], labels, linear=[(weight, None)])
        made.extend(torch.autograd.grad(total, hidden))

    buffer = chunks._chunk_rows(64, 20000, 4) * 20000 * 4  # in one chunk there are logits and their gradient
    assert sum(n for n in allocations(run) if n >= weight.nbytes // 2) <= 2 * buffer


@native_only
def test_the_logits_are_never_in_memory() -> None:
    loss = "lambda y, h, W, b: mmk.multimodal_cross_entropy([h], y, linear=[(W, b)])[0]"
    assert peak_bytes(loss, [("rows", "width"), ("classes", "width"), ("classes",)]) < 100 << 20


h, w, y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
BAD: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "linear: expected a list of pairs (weight, bias or None); got Tensor", w),
    (ValueError, "linear: expected 1 heads, one for each modality; got 2", [(w, None), (w, None)]),
    (TypeError, "linear[0]: expected a pair (weight, bias or None); got Tensor", [w]),
    (TypeError, "linear[0]: expected a pair (weight, bias or None); got 1 elements", [(w,)]),
    (TypeError, "linear[0][0]: expected a torch.Tensor; got NoneType", [(None, None)]),
    (ValueError, "linear[0][0]: expected shape (C, 3); got (3, 5)", [(w.t(), None)]),
    (TypeError, "linear[0][0]: expected the dtype of logits[0], torch.float32; got", [(w.half(), None)]),
    (ValueError, "linear[0][1]: expected shape (5,); got (3,)", [(w, h[0])]),
]


@pytest.mark.parametrize(("error", "message", "heads"), BAD, ids=[m[:60] for _, m, _ in BAD])
def test_bad_input(error: type[Exception], message: str, heads: Any) -> None:
    with pytest.raises(error, match=re.escape(f"multimodal_cross_entropy: {message}")):
        mmk.multimodal_cross_entropy([h], y, linear=heads)


def test_a_label_out_of_range_raises(either_backend: str) -> None:
    with pytest.raises(ValueError, match="labels: expected labels from 0 to 4"):
        mmk.multimodal_cross_entropy([h], y + 5, linear=[(w, None)])
