"""merge_embeddings on every backend and instruction set, and inside torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from environment import DEVICE, HERE
from row_ops import DTYPES
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import poisoned_memory, same_bits


def make(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    length: int = 9,
    features: int = 37,
    counts: tuple[int, ...] = (4, 0, 3),
) -> tuple[Tensor, list[Tensor], Tensor]:
    """text, modals and a random mask with as many True positions as the modals have rows."""
    grad = dtype.is_floating_point
    text = (torch.randn(batch, length, features) * 100).to(dtype).requires_grad_(grad)
    modals = [(torch.randn(n, features) * 100).to(dtype).requires_grad_(grad) for n in counts]
    mask = torch.zeros(batch * length, dtype=torch.bool)
    mask[torch.randperm(batch * length)[: sum(counts)]] = True
    return text, modals, mask.view(batch, length)


def scattered(text: Tensor, modals: list[Tensor], mask: Tensor) -> Tensor:
    return text.masked_scatter(mask.unsqueeze(-1), torch.cat(modals))


SIZES: dict[str, dict[str, Any]] = {
    "several modals": {},
    "one modal": dict(counts=(5,)),
    "nothing to insert": dict(counts=(0,)),
    "everything replaced": dict(counts=(10, 8)),
    "one feature": dict(features=1),
    "several tasks": dict(batch=3, length=131, features=5, counts=(100, 60)),
    "large enough to bypass the caches": dict(batch=1, length=300, features=2051, counts=(1, 130)),
    "no batch": dict(batch=0, counts=(0,)),
    "no tokens": dict(length=0, counts=(0,)),
    "no features": dict(features=0),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_gradients_are_those_of_masked_scatter_bit_for_bit(
    dtype: torch.dtype, size: str, backend: str
) -> None:
    text, modals, mask = make(dtype, **SIZES[size])
    grad = torch.randn(text.shape).to(dtype)
    with poisoned_memory():
        got = mmk.merge_embeddings(text, modals, mask)
        grads = torch.autograd.grad(got, [text, *modals], grad)
    want = scattered(text, modals, mask)
    assert same_bits([got, *grads], [want, *torch.autograd.grad(want, [text, *modals], grad)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    text, modals, mask = make(dtype)
    assert torch.equal(mmk.merge_embeddings(text, modals, mask), scattered(text, modals, mask))


def test_values_that_are_replaced_or_absent_do_not_matter(backend: str) -> None:
    text, modals, mask = make()
    poisoned = text.detach().masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    got, want = mmk.merge_embeddings(poisoned, modals, mask), scattered(text, modals, mask)
    assert same_bits([got], [want])
    (grad,) = torch.autograd.grad(got.sum(), poisoned)
    assert torch.equal(grad[..., 0], 1 - mask.float())


def test_the_formula(backend: str) -> None:
    text, modals, mask = make()
    want, rows = text.detach().clone(), iter(torch.cat(modals).detach())
    for b, at in mask.nonzero().tolist():
        want[b, at] = next(rows)
    assert torch.equal(mmk.merge_embeddings(text, modals, mask), want)
    assert torch.equal(mmk.merge_embeddings(text, torch.cat(modals), mask), want)


on_the_cpu = pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU a count that differs is an assertion there: it ends the process"
)


@on_the_cpu
@pytest.mark.parametrize("counts", [(3, 3), (3, 5)], ids=["too few rows", "too many rows"])
def test_a_count_that_differs_raises(counts: tuple[int, int], backend: str) -> None:
    text, _, mask = make(counts=(7,))
    modals = [torch.randn(n, 37) for n in counts]
    message = f"^merge_embeddings: mask: expected {sum(counts)} True positions, one for each row of modal; got 7$"
    for check in (None, True):
        with pytest.raises(ValueError, match=message):
            mmk.merge_embeddings(text, modals, mask, check=check)


def test_without_the_check_rows_that_are_left_over_get_no_gradient(backend: str) -> None:
    text, _, mask = make(counts=(7,))
    modals = [torch.randn(n, 37, requires_grad=True) for n in (3, 5, 2)]
    out = mmk.merge_embeddings(text, modals, mask, check=False)
    assert torch.equal(out, scattered(text, modals, mask))
    with poisoned_memory():
        grads = torch.autograd.grad(out.sum(), modals)
    for grad, used in zip(grads, (3, 4, 0), strict=True):
        assert grad[:used].eq(1).all() and grad[used:].eq(0).all()


@on_the_cpu
def test_without_the_check_too_few_rows_raise_all_the_same(backend: str) -> None:
    if backend == "triton":
        pytest.skip("kernels of a GPU trust the mask")
    text, _, mask = make(counts=(7,))
    with pytest.raises((ValueError, IndexError)):
        mmk.merge_embeddings(text, torch.randn(6, 37), mask, check=False)


text, modal, mask = torch.zeros(2, 3, 8), torch.zeros(2, 8), torch.tensor([[True, False, False]] * 2)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "text: expected a torch.Tensor; got int", (3, modal, mask), {}),
    (ValueError, "text: expected 3 dims (B, L, C); got shape (3, 8)", (text[0], modal, mask), {}),
    (TypeError, "modal: expected a torch.Tensor; got NoneType", (text, None, mask), {}),
    (TypeError, "modal[1]: expected a torch.Tensor; got int", (text, [modal, 1], mask), {}),
    (ValueError, "modal: expected a tensor or at least one in a list; got none", (text, [], mask), {}),
    (ValueError, "modal: expected shape (T, 8); got (2, 7)", (text, modal[:, 1:], mask), {}),
    (TypeError, "modal: expected the dtype of text, torch.float32; got torch.float16", (text, modal.half(), mask), {}),
    (RuntimeError, f"modal: expected the device of text, {HERE}; got meta", (text, modal.to("meta"), mask), {}),
    (TypeError, "mask: expected dtype bool; got torch.int64", (text, modal, mask.long()), {}),
    (ValueError, "mask: expected shape (2, 3); got (1, 3)", (text, modal, mask[:1]), {}),
    (TypeError, "check: expected a bool or None; got int", (text, modal, mask), {"check": 1}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^merge_embeddings: " + re.escape(message)):
        mmk.merge_embeddings(*inputs, **options)
