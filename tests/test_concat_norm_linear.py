"""concat_norm_linear on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import native_only
from environment import HERE
from fusion_cases import ACTIVATIONS, allocations, each_dtype, few_dtypes, leaf
from op_contract import check_results_in_memory
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op

WIDTHS = (13, 1, 18)


def make(
    lead: tuple[int, ...] = (9,),
    widths: tuple[int, ...] = WIDTHS,
    features: int = 11,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Modalities, weight and bias of the norm, weight and bias of the linear layer."""
    width = sum(widths)
    xs = [(torch.randn(*lead, k) + mean).to(dtype).requires_grad_() for k in widths]
    norm = leaf(width, dtype=dtype), leaf(width, dtype=dtype)
    return xs, *norm, leaf(features, width, dtype=dtype, gain=max(width, 1) ** -0.5), leaf(features, dtype=dtype)


SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "one row": dict(lead=(1,), widths=(30, 17, 35), features=33),
    "one modality": dict(widths=(37,)),
    "one modality, a whole block of rows": dict(lead=(96,), widths=(133,), features=97),
    "one modality, more than a block of rows": dict(lead=(101,), widths=(133,), features=97),
    "many modalities of width 1 to 3": dict(widths=(1, 2, 3, 1, 2, 3, 1, 2, 3, 1)),
    "width 0 first, between and last": dict(widths=(0, 19, 0, 5, 0)),
    "every width 0": dict(widths=(0, 0)),
    "two features to normalise": dict(widths=(1, 1)),
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


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES)
@each_dtype
def test_outputs_and_gradients(shape: str, norm: str, dtype: torch.dtype, backend: str) -> None:
    xs, g, h, weight, bias = make(dtype=dtype, **SHAPES[shape])
    (out,) = check_op(mmk.concat_norm_linear, xs, g, h, weight, bias, backend=backend, norm=norm)
    assert out.shape == (*xs[0].shape[:-1], weight.shape[0])
    check_op(mmk.concat_norm_linear, xs, g, h, weight, backend=backend, norm=norm, activation="gelu")


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@few_dtypes
def test_every_activation_with_and_without_biases(
    activation: str | None, norm: str, dtype: torch.dtype, backend: str
) -> None:
    xs, g, h, weight, bias = make(dtype=dtype)
    for norm_bias, linear_bias in itertools.product((h, None), (bias, None)):
        options: dict[str, Any] = {"activation": activation, "norm": norm}
        check_op(mmk.concat_norm_linear, xs, g, norm_bias, weight, linear_bias, backend=backend, **options)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_eps_and_rows_without_variance(norm: str, eps: float, backend: str) -> None:
    xs, g, h, weight, bias = make()
    check_op(mmk.concat_norm_linear, xs, g, h, weight, bias, backend=backend, norm=norm, eps=eps)
    if eps > 0:
        constant = [torch.full_like(x, 3.0).requires_grad_() for x in xs]
        check_op(mmk.concat_norm_linear, constant, g, h, weight, bias, backend=backend, norm=norm, eps=eps)


def test_the_reference_is_the_written_out_formula() -> None:
    xs, g, h, weight, bias = make()
    xs = [x.double() for x in xs]
    g, h, weight, bias = (x.double() for x in (g, h, weight, bias))
    width = sum(WIDTHS)
    mean = sum(x.sum(-1, keepdim=True) for x in xs) / width
    columns = list(zip(*(t.split(WIDTHS, -1) for t in (g, h, weight)), strict=True))
    for norm in ("layer", "rms"):
        shift = mean if norm == "layer" else 0
        scale = (sum(((x - shift) ** 2).sum(-1, keepdim=True) for x in xs) / width + 1e-3) ** -0.5
        want = bias + sum(((x - shift) * scale * gi + hi) @ wi.T for x, (gi, hi, wi) in zip(xs, columns, strict=True))
        got = mmk.concat_norm_linear(xs, g, h, weight, bias, norm=norm, eps=1e-3)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@each_dtype
def test_a_mean_of_a_thousand_deviations_loses_nothing(norm: str, dtype: torch.dtype, backend: str) -> None:
    """E[x²] − E[x]² in float32 would be off by several per cent here. In float32 the mean's own last digit decides."""
    xs, g, h, weight, bias = make((33,), (150, 70), 40, dtype, mean=1e3)
    for activation in (None, "gelu"):
        options: dict[str, Any] = {"norm": norm, "activation": activation}
        factor = 4.0 if dtype == torch.float32 else 2.0
        (got,) = check_op(mmk.concat_norm_linear, xs, g, h, weight, bias, backend=backend, factor=factor, **options)
        if dtype == torch.float32:
            wide = [x.double() for x in xs], *(x.double() for x in (g, h, weight, bias))
            with mmk.use_backend("reference"):
                oracle = mmk.concat_norm_linear(*wide, **options)
            assert float(((got - oracle).norm() / oracle.norm()).detach()) < 1e-3


def test_only_the_gradients_asked_for_are_computed(backend: str) -> None:
    xs, *parameters = make()
    inputs = [*xs, *parameters]

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        y = mmk.concat_norm_linear(leaves[:3], *leaves[3:], activation="gelu")
        return torch.autograd.grad(y.sin().sum(), [x for x in leaves if x.requires_grad])

    full = gradients(inputs)
    for wanted in itertools.product((False, True), repeat=7):
        if any(wanted):
            some = gradients([x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)])
            for got, want in zip(some, [g for g, w in zip(full, wanted, strict=True) if w], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@native_only
def test_frozen_parameters_cost_nothing() -> None:
    xs, *parameters, _ = make((512,), (512, 512), 256)

    def allocated(leaves: list[Tensor], parameters: list[Tensor]) -> int:
        y = mmk.concat_norm_linear(xs, *parameters)
        grad = torch.randn_like(y)
        return sum(allocations(lambda: torch.autograd.grad(y, leaves, grad)))

    trained, frozen = allocated([*xs, *parameters], parameters), allocated(xs, [p.detach() for p in parameters])
    assert trained - frozen >= sum(4 * p.numel() for p in parameters), "a gradient of frozen parameters is formed"


def test_nothing_as_wide_as_the_concatenation_is_allocated(native_isa: str) -> None:
    rows, widths, features = 2048, (256, 192, 256), 24
    xs, *parameters = make((rows,), widths, features)
    concatenation = rows * sum(widths) * 4
    small = 2 * rows * features * 4 + 6 * parameters[2].numel() * 4 + concatenation // 4

    def ours() -> Tensor:
        return mmk.concat_norm_linear(xs, *parameters, activation="gelu")

    def plain() -> Tensor:
        g, h, weight, bias = parameters
        return F.gelu(F.linear(F.layer_norm(torch.cat(xs, -1), (sum(widths),), g, h), weight, bias))

    for leaves, needed in (([*xs, *parameters], concatenation), (parameters, 0)):
        for x in xs:
            x.requires_grad_(needed > 0)
        sizes = allocations(lambda leaves=leaves: torch.autograd.grad(ours().sum(), leaves))
        assert max(sizes) < 0.6 * concatenation
        assert sum(sizes) <= needed + small
        in_plain_torch = allocations(lambda leaves=leaves: torch.autograd.grad(plain().sum(), leaves))
        assert sum(in_plain_torch) > needed + small
    with torch.no_grad():
        assert sum(allocations(ours)) <= small


def everything(lead: tuple[int, ...], widths: tuple[int, ...], features: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(2)
    xs, *parameters = make(lead, widths, features, dtype, mean=2.0)
    y = mmk.concat_norm_linear(xs, *parameters, activation="gelu")
    return [y, *torch.autograd.grad(y, [*xs, *parameters], y.detach().cos())]


SPLITS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "many rows": ((1100,), (33, 18), 20),
    "many features": ((5,), (70, 9), 700),
    "long sums": ((3,), (1500, 700), 5),
    "middling": ((150,), (90, 41), 130),
    "one modality of few rows": ((90,), (300,), 200),
}


@pytest.mark.parametrize("split", SPLITS)
@few_dtypes
def test_the_same_bits_of_any_number_of_threads_and_in_fresh_memory(
    split: str, dtype: torch.dtype, native_isa: str
) -> None:
    check_results_in_memory(lambda: everything(*SPLITS[split], dtype))


def test_the_saved_statistics_are_mean_and_inverse_deviation(backend: str) -> None:
    xs, g, h, weight, bias = (x.detach() if isinstance(x, Tensor) else [t.detach() for t in x] for x in make(mean=5.0))
    features = torch.cat(xs, -1).double()
    for norm in ("layer", "rms"):
        arguments = (xs, g, h, weight, bias, norm, 1e-5, "gelu", True)
        _, preactivation, statistics = torch.ops.mmkernels.concat_norm_linear(*arguments)
        mean = features.mean(-1) if norm == "layer" else torch.zeros(9)
        inverse = ((features - mean[:, None]).square().mean(-1) + 1e-5).rsqrt()
        torch.testing.assert_close(statistics, torch.stack([mean, inverse], -1).float(), rtol=1e-5, atol=1e-5)
        assert preactivation.shape == (9, 11)


x, g, w = torch.zeros(2, 3), torch.zeros(6), torch.zeros(4, 6)
meta = torch.zeros(6, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, r"xs: expected a list of tensors; got Tensor", (x, g, g, w), {}),
    (ValueError, r"xs: expected at least one tensor; got an empty list", ([], g, g, w), {}),
    (TypeError, r"xs\[1\]: expected the dtype of xs\[0\].*; got torch.float16", ([x, x.half()], g, g, w), {}),
    (ValueError, r"xs\[1\]: expected shape \(2, K_2\).*; got \(3,\)", ([x, x[0]], g, g, w), {}),
    (TypeError, r"norm_weight: expected a torch.Tensor; got NoneType", ([x, x], None, g, w), {}),
    (ValueError, r"norm_weight: expected shape \(6,\); got \(3,\)", ([x, x], x[0], g, w), {}),
    (ValueError, r"norm_bias: expected shape \(6,\); got \(3,\)", ([x, x], g, x[0], w), {}),
    (RuntimeError, rf"norm_bias: expected the device of xs\[0\], {HERE}; got meta", ([x, x], g, meta, w), {}),
    (TypeError, r"weight: expected the dtype of xs\[0\].*; got torch.float64", ([x, x], g, g, w.double()), {}),
    (ValueError, r"weight: expected shape \(N, 6\); got \(4, 5\)", ([x, x], g, g, w[:, 1:]), {}),
    (ValueError, r"bias: expected shape \(4,\); got \(6,\)", ([x, x], g, g, w, g), {}),
    (ValueError, r"norm: expected 'layer' or 'rms'; got 'batch'", ([x, x], g, g, w), {"norm": "batch"}),
    (TypeError, r"eps: expected a number; got str", ([x, x], g, g, w), {"eps": "1e-5"}),
    (ValueError, r"eps: expected a number ≥ 0; got -1.0", ([x, x], g, g, w), {"eps": -1.0}),
    (ValueError, r"eps: expected a number ≥ 0; got nan", ([x, x], g, g, w), {"eps": math.nan}),
    (
        ValueError,
        r"activation: expected None or one of relu.*; got 'swish'",
        ([x, x], g, g, w),
        {"activation": "swish"},
    ),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^concat_norm_linear: " + message):
        mmk.concat_norm_linear(*inputs, **options)
