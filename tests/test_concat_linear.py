"""concat_linear on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from environment import HERE
from fusion_cases import (
    ACTIVATIONS,
    allocations,
    each_dtype,
    few_dtypes,
    flat,
    leaf,
    presence_patterns,
    spoiled,
)
from op_contract import check_results_in_memory
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits

WIDTHS = (13, 1, 18)


def make(
    lead: tuple[int, ...] = (9,),
    widths: tuple[int, ...] = WIDTHS,
    features: int = 11,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Modalities, weight and bias."""
    gain = max(sum(widths), 1) ** -0.5
    weight = leaf(features, sum(widths), dtype=dtype, gain=gain)
    return [leaf(*lead, k, dtype=dtype) for k in widths], weight, leaf(features, dtype=dtype)


SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "one row, sentiment analysis": dict(lead=(1,), widths=(300, 74, 35), features=33),
    "one modality": dict(widths=(37,)),
    "many modalities of width 1 to 3": dict(widths=(1, 2, 3, 1, 2, 3, 1, 2, 3, 1)),
    "width 0 first, between and last": dict(widths=(0, 19, 0, 5, 0)),
    "every width 0": dict(widths=(0, 0)),
    "several tiles each way": dict(lead=(131,), widths=(65, 130, 3), features=97),
    "more features than rows": dict(lead=(3,), widths=(40, 24), features=259),
    "whole vectors": dict(lead=(64,), widths=(64, 32), features=64),
    "longer than a block of K": dict(lead=(7,), widths=(700, 500), features=17),
    "one feature": dict(lead=(70,), features=1),
    "1-D inputs": dict(lead=()),
    "three leading dims": dict(lead=(2, 3, 5)),
    "no rows": dict(lead=(4, 0)),
    "no features": dict(features=0),
    "nothing at all": dict(lead=(0,), widths=(0,), features=0),
}


@pytest.mark.parametrize("shape", SHAPES)
@each_dtype
def test_outputs_and_gradients(shape: str, dtype: torch.dtype, backend: str) -> None:
    xs, weight, bias = make(dtype=dtype, **SHAPES[shape])
    (out,) = check_op(mmk.concat_linear, xs, weight, bias, backend=backend)
    assert out.shape == (*xs[0].shape[:-1], weight.shape[0])
    check_op(mmk.concat_linear, xs, weight, backend=backend)
    residual, gate = leaf(*out.shape, dtype=dtype), leaf(weight.shape[0], dtype=dtype)
    presence = torch.rand(*out.shape[:-1], len(xs)) > 0.3
    options: dict[str, Any] = {"activation": "gelu", "presence": presence, "residual": residual, "gate": gate}
    check_op(mmk.concat_linear, xs, weight, bias, backend=backend, **options)


@pytest.mark.parametrize("rows", (290, 500, 570, 800))
@few_dtypes
def test_the_rows_of_a_wide_gradient_are_summed_whatever_they_are_cut_into(
    rows: int, dtype: torch.dtype, native_isa: str
) -> None:
    xs, weight, bias = make(lead=(rows,), widths=(9, 4), features=2800, dtype=dtype)
    check_op(mmk.concat_linear, xs, weight, bias, backend=native_isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_dtype
def test_every_activation_with_every_presence_residual_and_gate(
    activation: str | None, dtype: torch.dtype, backend: str
) -> None:
    xs, weight, bias = make(dtype=dtype)
    patterns = presence_patterns(9, 3)
    presences = [None, patterns["one absent"], patterns["per row"]]
    residuals = [None, leaf(9, 11, dtype=dtype)]
    gates = [None, leaf(dtype=dtype), leaf(11, dtype=dtype)]
    for presence, residual, gate in itertools.product(presences, residuals, gates):
        options = {"activation": activation, "presence": presence, "residual": residual, "gate": gate}
        check_op(mmk.concat_linear, xs, weight, bias, backend=backend, **options)


def test_the_reference_is_the_sum_of_a_linear_layer_per_modality() -> None:
    xs, weight, bias = (x if isinstance(x, list) else x.double() for x in make())
    xs = [x.double() for x in xs]
    residual, gate = torch.randn(9, 11).double(), torch.randn(11).double()
    presence = torch.rand(9, 3) > 0.4
    total = bias.expand(9, 11)
    for i, (x, w) in enumerate(zip(xs, weight.split(WIDTHS, 1), strict=True)):
        for row in range(9):
            if presence[row, i]:
                total = total + F.one_hot(torch.tensor(row), 9)[:, None] * torch.einsum("k,nk->n", x[row], w)
    sigmoid = 1 / (1 + torch.exp(-total))
    formulas = {
        None: total,
        "relu": total.clamp(min=0),
        "gelu": total * (1 + torch.erf(total / math.sqrt(2))) / 2,
        "gelu_tanh": total * (1 + torch.tanh(math.sqrt(2 / math.pi) * (total + 0.044715 * total**3))) / 2,
        "silu": total * sigmoid,
        "tanh": 2 / (1 + torch.exp(-2 * total)) - 1,
        "sigmoid": sigmoid,
        "quick_gelu": total / (1 + torch.exp(-1.702 * total)),
    }
    for activation in ACTIVATIONS:
        options: dict[str, Any] = {"activation": activation, "presence": presence}
        got = mmk.concat_linear(xs, weight, bias, residual=residual, gate=gate, **options)
        torch.testing.assert_close(got, residual + torch.tanh(gate) * formulas[activation])


@few_dtypes
def test_views_of_one_concatenation_and_strided_leading_dims(dtype: torch.dtype, backend: str) -> None:
    _, weight, bias = make(dtype=dtype)
    whole = torch.randn(4, 3, 32).to(dtype)
    for tensor in (whole, whole.transpose(0, 1), whole[:, ::2], whole.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        xs = [x.requires_grad_() for x in tensor.detach().split(WIDTHS, -1)]
        presence = torch.rand(tensor.shape[1], tensor.shape[0], 3).transpose(0, 1) > 0.4
        check_op(mmk.concat_linear, xs, weight, bias, presence=presence, backend=backend)


def test_one_tensor_may_be_several_modalities(backend: str) -> None:
    x, weight = leaf(9, 6), leaf(11, 12)
    y = mmk.concat_linear([x, x], weight, activation="tanh")
    want = torch.tanh(torch.cat([x, x], -1) @ weight.T)
    torch.testing.assert_close(y, want)
    for got, expected in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(want.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@few_dtypes
def test_an_absent_modality_is_never_read(garbage: float, dtype: torch.dtype, backend: str) -> None:
    xs, weight, bias = make((70,), (33, 1, 40), 35, dtype)
    residual, gate = leaf(70, 35, dtype=dtype), leaf(35, dtype=dtype)
    for presence in presence_patterns(70, 3).values():
        results = []
        for filler in (0.0, garbage):
            sources = spoiled(xs, presence, filler)
            options: dict[str, Any] = {"activation": "gelu", "residual": residual, "gate": gate}
            y = mmk.concat_linear(sources, weight, bias, presence=presence, **options)
            leaves = [*sources, weight, bias, residual, gate]
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        clean, dirty = results
        assert same_bits(clean, dirty)
        assert all(x.isfinite().all() for x in clean)
        everywhere = presence.expand(70, 3)
        for i, (grad, columns) in enumerate(zip(clean[1:4], clean[4].split((33, 1, 40), 1), strict=True)):
            assert not grad[~everywhere[:, i]].any()
            assert everywhere[:, i].any() or not columns.any()


def test_only_the_gradients_asked_for_are_computed(backend: str) -> None:
    xs, weight, bias = make()
    inputs = [*xs, weight, bias, leaf(9, 11), leaf(11)]

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        *sources, w, b, residual, gate = leaves
        y = mmk.concat_linear(sources, w, b, activation="gelu", residual=residual, gate=gate)
        return torch.autograd.grad(y.sin().sum(), [x for x in leaves if x.requires_grad])

    full = gradients(inputs)
    for wanted in itertools.product((False, True), repeat=7):
        if any(wanted):
            some = gradients([x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)])
            for got, want in zip(some, [g for g, w in zip(full, wanted, strict=True) if w], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@native_only
def test_a_frozen_weight_costs_nothing() -> None:
    xs, weight, _ = make((512,), (512, 512), 256)

    def allocated(leaves: list[Tensor], weight: Tensor) -> int:
        y = mmk.concat_linear(xs, weight)
        grad = torch.randn_like(y)
        return sum(allocations(lambda: torch.autograd.grad(y, leaves, grad)))

    trained, frozen = allocated([*xs, weight], weight), allocated(xs, weight.detach())
    assert trained - frozen >= 4 * weight.numel(), "the gradient of the frozen weight is formed"
    assert frozen < sum(4 * x.numel() for x in xs) + 4 * weight.numel()


def plain(xs: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(torch.cat(xs, -1), weight, bias))


def test_nothing_as_wide_as_the_concatenation_is_allocated(native_isa: str) -> None:
    rows, widths, features = 2048, (256, 192, 256), 24
    xs, weight, bias = make((rows,), widths, features)
    concatenation, gradients = rows * sum(widths) * 4, rows * sum(widths) * 4
    small = 2 * rows * features * 4 + 4 * weight.numel() * 4 + concatenation // 4

    def train(function: Any, leaves: list[Tensor]) -> Any:
        return lambda: torch.autograd.grad(function(xs, weight, bias).sum(), leaves)

    def ours(xs: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
        return mmk.concat_linear(xs, weight, bias, activation="gelu")

    for leaves, needed in ((flat([xs, weight, bias]), gradients), ([weight, bias], 0)):
        for x in xs:
            x.requires_grad_(needed > 0)
        sizes = allocations(train(ours, leaves))
        assert max(sizes) < 0.6 * concatenation
        assert sum(sizes) <= needed + small
        assert sum(allocations(train(plain, leaves))) > needed + small  # what this would find in plain torch
    with torch.no_grad():
        assert sum(allocations(lambda: ours(xs, weight, bias))) <= small


@native_only
def test_the_process_does_not_grow_by_a_concatenation() -> None:
    """As above for memory that torch does not allocate: with frozen modalities of 100 MB there is little to write."""
    code = """
import resource, torch, mmkernels as mmk
def train(rows):
    xs = [torch.randn(rows, k) for k in (1024, 512)]
    weight = torch.randn(16, 1536, requires_grad=True)
    g, h = torch.randn(1536, requires_grad=True), torch.randn(1536, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mmk.concat_linear(xs, weight, activation="gelu").sum().backward()
    mmk.concat_norm_linear(xs, g, h, weight, activation="gelu").sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
train(64)
print(train(16384))
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 40


def test_forward_keeps_at_most_one_output_for_backward(backend: str) -> None:
    xs, weight, bias = make((50,), (64, 64))
    known, kept = {x.data_ptr() for x in (*xs, weight, bias)}, []
    for activation, outputs in (("gelu", 1), (None, 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            y = mmk.concat_linear(xs, weight, bias, activation=activation)
        extra = sum(x.numel() for x in kept if x.data_ptr() not in known)
        assert extra <= outputs * y.numel()


def everything(lead: tuple[int, ...], widths: tuple[int, ...], features: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and all gradients of a call with every option."""
    torch.manual_seed(2)
    xs, weight, bias = make(lead, widths, features, dtype)
    residual, gate = leaf(*lead, features, dtype=dtype), leaf(features, dtype=dtype)
    presence = torch.rand(*lead, len(widths)) > 0.2
    options: dict[str, Any] = {"activation": "gelu", "presence": presence, "residual": residual, "gate": gate}
    y = mmk.concat_linear(xs, weight, bias, **options)
    return [y, *torch.autograd.grad(y, [*xs, weight, bias, residual, gate], y.detach().cos())]


SPLITS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "many rows": ((1100,), (33, 18), 20),
    "many features": ((5,), (70, 9), 700),
    "long sums": ((3,), (1500, 700), 5),
    "middling": ((150,), (90, 41), 130),
    "one block of rows": ((90,), (300, 41), 200),
    "wide": ((200,), (700, 90), 130),
}


@pytest.mark.parametrize("split", SPLITS)
@few_dtypes
def test_the_same_bits_of_any_number_of_threads_and_in_fresh_memory(
    split: str, dtype: torch.dtype, native_isa: str
) -> None:
    check_results_in_memory(lambda: everything(*SPLITS[split], dtype))


x, w = torch.zeros(2, 3), torch.zeros(4, 6)
meta = torch.zeros(2, 3, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, r"xs: expected a list of tensors; got Tensor", (x, w), {}),
    (ValueError, r"xs: expected at least one tensor; got an empty list", ([], w), {}),
    (TypeError, r"xs\[0\]: expected a torch.Tensor; got NoneType", ([None, x], w), {}),
    (TypeError, r"xs\[1\]: expected a torch.Tensor; got float", ([x, 1.0], w), {}),
    (TypeError, r"xs\[0\]: expected dtype float32.*; got torch.int64", ([x.long(), x.long()], w), {}),
    (TypeError, r"xs\[1\]: expected the dtype of xs\[0\], torch.float32; got torch.float16", ([x, x.half()], w), {}),
    (RuntimeError, rf"xs\[1\]: expected the device of xs\[0\], {HERE}; got meta", ([x, meta], w), {}),
    (ValueError, r"xs\[0\]: expected at least 1 dim \(\*, K_i\); got a scalar", ([x[0, 0]], w), {}),
    (ValueError, r"xs\[1\]: expected shape \(2, K_2\).*xs\[0\]; got \(1, 3\)", ([x, x[:1]], w), {}),
    (ValueError, r"xs\[1\]: expected shape \(2, K_2\).*; got \(3,\)", ([x, x[0]], w), {}),
    (TypeError, r"weight: expected a torch.Tensor; got list", ([x, x], []), {}),
    (TypeError, r"weight: expected the dtype of xs\[0\].*; got torch.bfloat16", ([x, x], w.bfloat16()), {}),
    (ValueError, r"weight: expected shape \(N, 6\); got \(4, 5\)", ([x, x], w[:, 1:]), {}),
    (ValueError, r"weight: expected shape \(N, 6\); got \(6,\)", ([x, x], w[0]), {}),
    (ValueError, r"bias: expected shape \(4,\); got \(6,\)", ([x, x], w, w[0]), {}),
    (ValueError, r"bias: expected shape \(4,\); got \(\)", ([x, x], w, w[0, 0]), {}),
    (RuntimeError, rf"bias: expected the device of xs\[0\], {HERE}; got meta", ([x, x], w, meta), {}),
    (ValueError, r"activation: expected None or one of relu, .*; got 'swish'", ([x, x], w), {"activation": "swish"}),
    (TypeError, r"activation: expected None or one of relu, .*; got function", ([x, x], w), {"activation": F.celu}),
    (TypeError, r"presence: expected a torch.Tensor; got list", ([x, x], w), {"presence": [True, False]}),
    (TypeError, r"presence: expected dtype torch.bool; got torch.float32", ([x, x], w), {"presence": x}),
    (
        ValueError,
        r"presence: expected shape \(2, 2\) or \(2,\); got \(2, 3\)",
        ([x, x], w),
        {"presence": x.bool()},
    ),
    (ValueError, r"presence: .* \(2,\); got \(1, 2\)", ([x, x], w), {"presence": x[:1, :2].bool()}),
    (RuntimeError, rf"presence: .* {HERE}; got meta", ([x, x], w), {"presence": meta.bool()}),
    (ValueError, r"residual: expected shape \(2, 4\); got \(4,\)", ([x, x], w), {"residual": w[:, 0]}),
    (TypeError, r"residual: expected the dtype .*float64", ([x, x], w), {"residual": x.double()}),
    (TypeError, r"gate: expected a torch.Tensor; got float", ([x, x], w), {"gate": 0.5}),
    (ValueError, r"gate: expected a scalar or shape \(4,\); got \(1,\)", ([x, x], w), {"gate": w[0, :1]}),
    (TypeError, r"gate: expected the dtype .*; got torch.int64", ([x, x], w), {"gate": torch.tensor(1)}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^concat_linear: " + message):
        mmk.concat_linear(*inputs, **options)
