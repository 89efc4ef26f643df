"""gated_fusion on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from agreement import agree
from environment import HERE
from fusion_cases import (
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
from mmkernels.ops.gated_fusion import reference
from mmkernels.testing import check_op, same_bits

WIDTHS = (13, 1, 18)
FORMS: dict[str, tuple[tuple[int, ...], bool]] = {
    "sigmoid": ((13, 18), True),
    "softmax of two": ((13, 18), False),
    "softmax of three": (WIDTHS, False),
}
each_form = pytest.mark.parametrize("form", FORMS)


def make(
    widths: tuple[int, ...] = WIDTHS,
    sigmoid: bool = False,
    lead: tuple[int, ...] = (9,),
    features: int = 11,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Modalities, weights and biases of the values, weight and bias of the gates."""
    gates, width = features * (1 if sigmoid else len(widths)), sum(widths)
    return (
        [leaf(*lead, k, dtype=dtype) for k in widths],
        [leaf(features, k, dtype=dtype, gain=max(k, 1) ** -0.5) for k in widths],
        [leaf(features, dtype=dtype) for _ in widths],
        leaf(gates, width, dtype=dtype, gain=max(width, 1) ** -0.5),
        leaf(gates, dtype=dtype),
    )


SHAPES: dict[str, dict[str, Any]] = {
    "three modalities": {},
    "two modalities, sigmoid": dict(widths=(13, 18), sigmoid=True),
    "two modalities, softmax": dict(widths=(13, 18)),
    "one modality": dict(widths=(7,)),
    "six modalities": dict(widths=(3, 1, 4, 1, 5, 9)),
    "one row": dict(lead=(1,), widths=(30, 17), sigmoid=True, features=33),
    "widths 0": dict(widths=(0, 12, 0)),
    "every width 0, sigmoid": dict(widths=(0, 0), sigmoid=True),
    "several tiles each way": dict(lead=(131,), widths=(65, 40), features=70),
    "several tiles each way, sigmoid": dict(lead=(131,), widths=(65, 40), features=70, sigmoid=True),
    "whole vectors": dict(lead=(64,), widths=(32, 64), features=32, sigmoid=True),
    "one feature": dict(lead=(70,), features=1),
    "1-D inputs": dict(lead=()),
    "three leading dims": dict(lead=(2, 3, 5)),
    "no rows": dict(lead=(4, 0)),
    "no features": dict(features=0),
    "no features, sigmoid": dict(features=0, widths=(3, 4), sigmoid=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@each_dtype
def test_outputs_and_gradients(shape: str, dtype: torch.dtype, backend: str) -> None:
    xs, weights, biases, gate_weight, gate_bias = make(dtype=dtype, **SHAPES[shape])
    (out,) = check_op(mmk.gated_fusion, xs, weights, biases, gate_weight, gate_bias, backend=backend)
    assert out.shape == (*xs[0].shape[:-1], weights[0].shape[0])
    check_op(mmk.gated_fusion, xs, weights, None, gate_weight, backend=backend)
    presence = torch.rand(*out.shape[:-1], len(xs)) > 0.4
    check_op(mmk.gated_fusion, xs, weights, biases, gate_weight, gate_bias, presence=presence, backend=backend)


@each_form
@each_dtype
def test_every_presence(form: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make(*FORMS[form], dtype=dtype)
    for presence in presence_patterns(9, len(inputs[0])).values():
        check_op(mmk.gated_fusion, *inputs, presence=presence, backend=backend)


@each_form
@few_dtypes
def test_the_gate_is_returned_and_differentiable(form: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make(*FORMS[form], dtype=dtype)
    for presence in (None, *presence_patterns(9, len(inputs[0])).values()):
        y, z = check_op(mmk.gated_fusion, *inputs, presence=presence, return_gate=True, backend=backend)
        torch.testing.assert_close(y, mmk.gated_fusion(*inputs, presence=presence), rtol=2e-2, atol=2e-2)
        assert z.shape == (9, len(inputs[0]), 11)
        there = torch.ones(9, len(inputs[0]), dtype=torch.bool) if presence is None else presence.expand(9, -1)
        assert not z[~there].any()
        total = there.any(1, keepdim=True).to(dtype).expand(9, 11)
        torch.testing.assert_close(z.sum(1), total, rtol=1e-2, atol=1e-2)
        for filler in (torch.nan, torch.inf) if presence is not None else ():
            got = mmk.gated_fusion(
                spoiled(inputs[0], presence, filler), *inputs[1:], presence=presence, return_gate=True
            )
            assert same_bits([y, z], [t.detach() for t in got])


def test_the_gate_is_refused_as_anything_but_a_flag() -> None:
    with pytest.raises(TypeError, match=r"^gated_fusion: return_gate: expected a bool; got int"):
        mmk.gated_fusion(*make(), return_gate=1)  # type: ignore[call-overload]


def test_the_gate_under_compile_and_second_derivatives() -> None:
    xs, weights, biases, gate_weight, gate_bias = make()
    presence = torch.rand(9, 3) > 0.4

    def call(*leaves: Tensor) -> Tensor:
        y, z = mmk.gated_fusion(
            list(leaves), weights, biases, gate_weight, gate_bias, presence=presence, return_gate=True
        )
        return torch.cat([y[:, None], z], 1)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert agree([compiled(*xs)], [call(*xs)])

    def wide(*leaves: Tensor) -> Tensor:
        y, z = mmk.gated_fusion(
            list(leaves),
            *[[w.double() for w in ws] for ws in (weights, biases)],
            gate_weight.double(),
            gate_bias.double(),
            presence=presence,
            return_gate=True,
        )
        return y + z.sum(1)

    leaves = [x.detach().double().requires_grad_() for x in xs]
    assert torch.autograd.gradcheck(wide, leaves)
    assert torch.autograd.gradgradcheck(wide, leaves, fast_mode=True)


@each_form
def test_the_reference_is_the_written_out_formula_row_by_row(form: str) -> None:
    widths, sigmoid = FORMS[form]
    inputs = make(widths, sigmoid)
    xs, weights, biases, gate_weight, gate_bias = (
        [t.detach().double() for t in x] if isinstance(x, list) else x.detach().double() for x in inputs
    )
    presence = torch.rand(9, len(widths)) > 0.4
    presence[0], presence[1] = False, True
    got = mmk.gated_fusion(xs, weights, biases, gate_weight, gate_bias, presence=presence)
    for row in range(9):
        there = [i for i in range(len(widths)) if presence[row, i]]
        seen = torch.cat([x[row] if i in there else torch.zeros_like(x[row]) for i, x in enumerate(xs)])
        gate = gate_weight @ seen + gate_bias
        want = torch.zeros(11).double()
        if there:
            if not sigmoid:
                scores = torch.exp(gate.view(len(widths), 11))
                shares = {i: scores[i] / sum(scores[j] for j in there) for i in there}
            elif len(there) == 2:
                z = 1 / (1 + torch.exp(-gate))
                shares = {0: z, 1: 1 - z}
            else:
                shares = {there[0]: torch.ones(11).double()}
            want = sum(shares[i] * torch.tanh(weights[i] @ xs[i][row] + biases[i]) for i in there)
        torch.testing.assert_close(got[row], want)


@each_form
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@few_dtypes
def test_an_absent_modality_is_never_read(form: str, garbage: float, dtype: torch.dtype, backend: str) -> None:
    xs, *parameters = make(*FORMS[form], dtype=dtype)
    count = len(xs)
    for presence in presence_patterns(9, count).values():
        results = []
        for filler in (0.0, garbage):
            sources = spoiled(xs, presence, filler)
            y = mmk.gated_fusion(sources, *parameters, presence=presence)
            results.append([y, *torch.autograd.grad(y, flat([sources, parameters]), torch.ones_like(y))])
        clean, dirty = results
        assert same_bits(clean, dirty)
        assert all(x.isfinite().all() for x in clean)
        everywhere = presence.expand(9, count)
        assert not clean[0][~everywhere.any(-1)].any()
        for i in range(count):
            assert not clean[1 + i][~everywhere[:, i]].any()
            if not everywhere[:, i].any():
                assert not clean[1 + count + i].any()  # of its weight
                assert not clean[1 + 2 * count + i].any()  # of its bias


@each_dtype
def test_large_gates_saturate_and_stay_finite(dtype: torch.dtype, backend: str) -> None:
    for form in FORMS.values():
        xs, weights, biases, gate_weight, gate_bias = make(*form, dtype=dtype)
        steep = (gate_weight.detach() * 100).requires_grad_()
        (out,) = check_op(mmk.gated_fusion, xs, weights, biases, steep, gate_bias, backend=backend, factor=3.0)
        assert out.isfinite().all()


@each_form
def test_only_the_gradients_asked_for_are_computed(form: str, backend: str) -> None:
    inputs = make(*FORMS[form])
    count = len(inputs[0])
    leaves = flat(inputs)

    def gradients(leaves: list[Tensor]) -> tuple[Tensor, ...]:
        lists = leaves[:count], leaves[count : 2 * count], leaves[2 * count : 3 * count]
        y = mmk.gated_fusion(*lists, *leaves[3 * count :])
        return torch.autograd.grad(y.sin().sum(), [x for x in leaves if x.requires_grad])

    full = gradients(leaves)
    one = [[i == j for i in range(len(leaves))] for j in range(len(leaves))]
    all_but_one = [[not w for w in wanted] for wanted in one]
    for wanted in itertools.chain(one, all_but_one):
        some = gradients([x.detach().requires_grad_(w) for x, w in zip(leaves, wanted, strict=True)])
        for got, want in zip(some, [g for g, w in zip(full, wanted, strict=True) if w], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_nothing_as_wide_as_the_concatenation_is_allocated(native_isa: str) -> None:
    rows, widths, features = 2048, (256, 192, 256), 8
    xs, *parameters = make(widths, lead=(rows,), features=features)
    concatenation = rows * sum(widths) * 4
    small = 8 * rows * 3 * features * 4 + 6 * 4 * features * sum(widths) * 4 + concatenation // 4

    def ours() -> Tensor:
        return mmk.gated_fusion(xs, *parameters)

    def plain() -> Tensor:
        with mmk.use_backend("reference"):
            return reference.gated_fusion(xs, *parameters, None)

    for leaves, needed in ((flat([xs, parameters]), concatenation), (flat(parameters), 0)):
        for x in xs:
            x.requires_grad_(needed > 0)
        sizes = allocations(lambda leaves=leaves: torch.autograd.grad(ours().sum(), leaves))
        assert max(sizes) < 0.6 * concatenation
        assert sum(sizes) <= needed + small
        in_plain_torch = allocations(lambda leaves=leaves: torch.autograd.grad(plain().sum(), leaves))
        assert sum(in_plain_torch) > needed + small


def everything(widths: tuple[int, ...], sigmoid: bool, rows: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(2)
    inputs = make(widths, sigmoid, (rows,), features, dtype)
    y = mmk.gated_fusion(*inputs, presence=torch.rand(rows, len(widths)) > 0.2)
    return [y, *torch.autograd.grad(y, flat(inputs), y.detach().cos())]


SPLITS = {
    "sigmoid, many rows": ((33, 18), True, 700, 20),
    "sigmoid, many features": ((70, 9), True, 5, 300),
    "softmax": ((40, 30, 20), False, 150, 70),
}


@pytest.mark.parametrize("split", SPLITS)
@few_dtypes
def test_the_same_bits_of_any_number_of_threads_and_in_fresh_memory(
    split: str, dtype: torch.dtype, native_isa: str
) -> None:
    check_results_in_memory(lambda: everything(*SPLITS[split], dtype))


x, w, g = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 6)
b, meta = torch.zeros(4), torch.zeros(4, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, r"xs: expected a list of tensors; got Tensor", (x, [w], None, g), {}),
    (ValueError, r"xs: expected at least one tensor; got an empty list", ([], [], None, g), {}),
    (ValueError, r"xs\[1\]: expected shape \(2, K_2\).*; got \(3,\)", ([x, x[0]], [w, w], None, g), {}),
    (TypeError, r"value_weights: expected a list of tensors; got Tensor", ([x, x], w, None, g), {}),
    (ValueError, r"value_weights: expected 2 tensors as in xs; got 1", ([x, x], [w], None, g), {}),
    (ValueError, r"value_weights\[0\]: expected shape \(N, 3\); got \(4, 6\)", ([x, x], [g, w], None, g), {}),
    (ValueError, r"value_weights\[1\]: expected shape \(4, 3\); got \(3, 3\)", ([x, x], [w, w[1:]], None, g), {}),
    (TypeError, r"value_weights\[1\]: expected the dtype .*float16", ([x, x], [w, w.half()], None, g), {}),
    (TypeError, r"value_biases: expected a list of tensors; got Tensor", ([x, x], [w, w], b, g), {}),
    (ValueError, r"value_biases: expected 2 tensors as in xs; got 3", ([x, x], [w, w], [b, b, b], g), {}),
    (TypeError, r"value_biases\[1\]: expected a torch.Tensor; got NoneType", ([x, x], [w, w], [b, None], g), {}),
    (ValueError, r"value_biases\[0\]: expected shape \(4,\); got \(3,\)", ([x, x], [w, w], [b[1:], b], g), {}),
    (RuntimeError, rf"value_biases\[1\]: .* {HERE}; got meta", ([x, x], [w, w], [b, meta], g), {}),
    (ValueError, r"gate_weight: expected shape \(N, 6\); got \(4, 3\)", ([x, x], [w, w], None, w), {}),
    (
        ValueError,
        r"gate_weight: expected shape \(8, 6\) or \(4, 6\); got \(3, 6\)",
        ([x, x], [w, w], None, g[1:]),
        {},
    ),
    (
        ValueError,
        r"gate_weight: expected shape \(12, 9\); got \(4, 9\)",
        ([x] * 3, [w] * 3, None, b[:, None].expand(4, 9)),
        {},
    ),
    (ValueError, r"gate_bias: expected shape \(4,\); got \(3,\)", ([x, x], [w, w], None, g, b[1:]), {}),
    (TypeError, r"presence: expected dtype torch.bool; got torch.float32", ([x, x], [w, w], None, g), {"presence": x}),
    (ValueError, r"presence: .*; got \(3,\)", ([x, x], [w, w], None, g), {"presence": x[0].bool()}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^gated_fusion: " + message):
        mmk.gated_fusion(*inputs, **options)
