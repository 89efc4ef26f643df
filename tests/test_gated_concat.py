"""gated_concat on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from environment import HERE
from fusion_cases import allocations, each_dtype, few_dtypes, leaf
from op_contract import check_results_in_memory
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.gated_concat import reference
from mmkernels.testing import check_op


def make(
    lead: tuple[int, ...] = (9,),
    widths: tuple[int, int] = (13, 18),
    one_gate: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both modalities, weight and bias of the gates."""
    gates, width = 1 if one_gate else widths[0], sum(widths)
    x, y = (leaf(*lead, k, dtype=dtype) for k in widths)
    return x, y, leaf(gates, width, dtype=dtype, gain=max(width, 1) ** -0.5), leaf(gates, dtype=dtype)


SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "one row": dict(lead=(1,), widths=(300, 74)),
    "one feature each": dict(widths=(1, 1)),
    "first empty": dict(widths=(0, 5)),
    "second empty": dict(widths=(5, 0)),
    "both empty": dict(widths=(0, 0)),
    "several tiles each way": dict(lead=(131,), widths=(130, 37)),
    "whole vectors": dict(lead=(64,), widths=(64, 32)),
    "longer than a block of K": dict(lead=(7,), widths=(40, 900)),
    "1-D inputs": dict(lead=()),
    "three leading dims": dict(lead=(2, 3, 5)),
    "no rows": dict(lead=(4, 0)),
}


@pytest.mark.parametrize("one_gate", [False, True], ids=["a gate per feature", "one gate"])
@pytest.mark.parametrize("shape", SHAPES)
@each_dtype
def test_outputs_and_gradients(shape: str, one_gate: bool, dtype: torch.dtype, backend: str) -> None:
    x, y, weight, bias = make(one_gate=one_gate, dtype=dtype, **SHAPES[shape])
    (out,) = check_op(mmk.gated_concat, x, y, weight, bias, backend=backend)
    assert out.shape == (*x.shape[:-1], x.shape[-1] + y.shape[-1] + 1)
    assert torch.equal(out[..., x.shape[-1] : -1], y)
    check_op(mmk.gated_concat, x, y, weight, backend=backend)


@pytest.mark.parametrize("one_gate", [False, True], ids=["a gate per feature", "one gate"])
def test_the_reference_is_the_written_out_formula(one_gate: bool) -> None:
    x, y, weight, bias = (t.double() for t in make(one_gate=one_gate))
    got = mmk.gated_concat(x, y, weight, bias)
    for row in range(9):
        gate = 1 / (1 + torch.exp(-(weight[:, :13] @ x[row] + weight[:, 13:] @ y[row] + bias)))
        torch.testing.assert_close(got[row, :13], gate * x[row])
        torch.testing.assert_close(got[row, 31], gate.expand(13) @ x[row])


@pytest.mark.parametrize("one_gate", [False, True], ids=["a gate per feature", "one gate"])
def test_only_the_gradients_asked_for_are_computed(one_gate: bool, backend: str) -> None:
    inputs = make(one_gate=one_gate)

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        out = mmk.gated_concat(*leaves)
        return torch.autograd.grad(out.sin().sum(), [x for x in leaves if x.requires_grad])

    full = gradients(list(inputs))
    for wanted in itertools.product((False, True), repeat=4):
        if any(wanted):
            some = gradients([x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)])
            for got, want in zip(some, [g for g, w in zip(full, wanted, strict=True) if w], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_call_allocates_little_beside_its_output_and_gradients(native_isa: str) -> None:
    inputs = make((4096,), (64, 400), one_gate=True)
    output = 4096 * 465 * 4

    def train(function: Any) -> list[int]:
        out = function(*inputs)
        grad = torch.randn_like(out)
        return allocations(lambda: torch.autograd.grad(function(*inputs), inputs, grad))

    assert sum(train(mmk.gated_concat)) < 2 * output + output // 2  # the output, and gradients as large as the inputs
    assert sum(train(reference.gated_concat)) > 2 * output + output // 2


def everything(lead: tuple[int, ...], widths: tuple[int, int], one_gate: bool, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(2)
    inputs = make(lead, widths, one_gate, dtype)
    out = mmk.gated_concat(*inputs)
    return [out, *torch.autograd.grad(out, inputs, out.detach().cos())]


SPLITS = {
    "many rows": ((1100,), (33, 18), False),
    "many features": ((5,), (300, 9), False),
    "one gate, many features": ((70,), (700, 9), True),
    "one gate, many rows": ((900,), (20, 31), True),
}


@pytest.mark.parametrize("split", SPLITS)
@few_dtypes
def test_the_same_bits_of_any_number_of_threads_and_in_fresh_memory(
    split: str, dtype: torch.dtype, native_isa: str
) -> None:
    check_results_in_memory(lambda: everything(*SPLITS[split], dtype))


x, y, w = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3, 7)
meta = torch.zeros(2, 4, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, r"x: expected a torch.Tensor; got list", ([x], y, w)),
    (TypeError, r"y: expected a torch.Tensor; got NoneType", (x, None, w)),
    (TypeError, r"x: expected dtype float32.*; got torch.int64", (x.long(), y.long(), w.long())),
    (TypeError, r"y: expected the dtype of x, torch.float32; got torch.float16", (x, y.half(), w)),
    (RuntimeError, rf"y: expected the device of x, {HERE}; got meta", (x, meta, w)),
    (ValueError, r"x: expected at least 1 dim \(\*, Kx\); got a scalar", (x[0, 0], y, w)),
    (ValueError, r"y: expected shape \(2, Ky\); got \(1, 4\)", (x, y[:1], w)),
    (ValueError, r"y: expected shape \(2, Ky\); got \(\)", (x, y[0, 0], w)),
    (TypeError, r"weight: expected a torch.Tensor; got list", (x, y, [])),
    (TypeError, r"weight: expected the dtype of x.*; got torch.bfloat16", (x, y, w.bfloat16())),
    (ValueError, r"weight: expected shape \(3, 7\) or \(1, 7\); got \(2, 7\)", (x, y, w[1:])),
    (ValueError, r"weight: expected shape \(3, 7\) or \(1, 7\); got \(7,\)", (x, y, w[0])),
    (ValueError, r"bias: expected shape \(3,\); got \(4,\)", (x, y, w, y[0])),
    (ValueError, r"bias: expected shape \(1,\); got \(3,\)", (x, y, w[:1], x[0])),
]


@pytest.mark.parametrize(("error", "message", "inputs"), BAD, ids=[message[:40] for _, message, _ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...]
) -> None:
    with pytest.raises(error, match="^gated_concat: " + message):
        mmk.gated_concat(*inputs)
