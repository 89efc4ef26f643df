"""Absent modalities in low_rank_fusion, tensor_fusion_linear and bilinear_fusion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import op_contract as contract
import pytest
import torch
from conftest import FUZZED, use_implementation
from environment import HERE
from fusion_cases import each_dtype, leaf, presence_patterns, spoiled
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits

WIDTHS = (6, 5)
FILLERS = (torch.nan, torch.inf, 1e30)  # of what is absent


def low_rank(xs: list[Tensor], *parameters: Tensor, presence: Tensor | None = None) -> Tensor:
    return mmk.low_rank_fusion(xs, list(parameters[:-2]), *parameters[-2:], presence=presence)


def outer(xs: list[Tensor], *parameters: Tensor, presence: Tensor | None = None) -> Tensor:
    return mmk.tensor_fusion_linear(xs, *parameters, presence=presence)


def bilinear(xs: list[Tensor], *parameters: Tensor, presence: Tensor | None = None) -> Tensor:
    return mmk.bilinear_fusion(*xs, *parameters, rank=2, presence=presence)


def low_rank_parameters(outputs: int, dtype: torch.dtype) -> list[Tensor]:
    factors = [leaf(3, w + 1, outputs, dtype=dtype, gain=(w + 1) ** -0.5) for w in WIDTHS]
    return [*factors, leaf(3, dtype=dtype), leaf(outputs, dtype=dtype)]


def outer_parameters(outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [leaf(outputs, 42, dtype=dtype, gain=42**-0.5), leaf(outputs, dtype=dtype)]


def bilinear_parameters(outputs: int, dtype: torch.dtype) -> list[Tensor]:
    return [leaf(2 * outputs, w, dtype=dtype, gain=w**-0.5) for w in WIDTHS]


Op = tuple[Callable[..., Tensor], Callable[[int, torch.dtype], list[Tensor]]]
OPS: dict[str, Op] = {
    "low_rank_fusion": (low_rank, low_rank_parameters),
    "tensor_fusion_linear": (outer, outer_parameters),
    "bilinear_fusion": (bilinear, bilinear_parameters),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def make(op: Op, rows: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    return [leaf(rows, w, dtype=dtype) for w in WIDTHS], op[1](outputs, dtype)


@each_op
@each_dtype
@pytest.mark.parametrize(("rows", "outputs"), [(1, 7), (9, 5), (203, 130)])
def test_outputs_and_gradients(op: Op, rows: int, outputs: int, dtype: torch.dtype, backend: str) -> None:
    xs, parameters = make(op, rows, outputs, dtype)
    for presence in presence_patterns(rows, 2).values():
        check_op(op[0], xs, *parameters, presence=presence, backend=backend)


@each_op
def test_triton(op: Op, triton_backend: str) -> None:
    xs, parameters = make(op, 19, 18)
    for presence in presence_patterns(19, 2).values():
        check_op(op[0], xs, *parameters, presence=presence, backend=triton_backend)
        check_contents_are_never_read(op, xs, parameters, presence, fillers=(torch.nan,))


def check_contents_are_never_read(
    op: Op, xs: list[Tensor], parameters: list[Tensor], presence: Tensor, fillers: Sequence[float] = FILLERS
) -> None:
    def run(sources: list[Tensor], given: Tensor | None) -> list[Tensor]:
        out = op[0](sources, *parameters, presence=given)
        return [out.detach(), *torch.autograd.grad(out, [*sources, *parameters], contract.fixed_gradient(out))]

    expected = run(spoiled(xs, presence, 0.0), presence)
    for filler in fillers:
        got = run(spoiled(xs, presence, filler), presence)
        assert same_bits(got, expected)
    for i in range(2):
        absent = ~presence.expand(xs[0].shape[0], 2)[:, i]
        assert not expected[1 + i][absent].any()
    zeros = run(spoiled(xs, presence, 0.0), None)
    torch.testing.assert_close([expected[0], *expected[3:]], [zeros[0], *zeros[3:]])


@each_op
def test_an_absent_modality_counts_as_zeros_and_is_never_read(op: Op, backend: str) -> None:
    for rows, outputs in ((1, 7), (9, 5), (130, 33)):
        xs, parameters = make(op, rows, outputs)
        for presence in presence_patterns(rows, 2).values():
            check_contents_are_never_read(op, xs, parameters, presence)


def test_the_appended_one_of_an_absent_modality_stays(backend: str) -> None:
    (x, y), (f, g, weights, bias) = make(OPS["low_rank_fusion"], 4, 7)
    out = mmk.low_rank_fusion([x, y], [f, g], weights, bias, presence=torch.tensor([True, False]))
    expected = (weights[:, None, None] * (torch.cat([x.new_ones(4, 1), x], 1) @ f) * g[:, :1]).sum(0) + bias
    torch.testing.assert_close(out, expected)
    (x, y), (weight, bias) = make(OPS["tensor_fusion_linear"], 4, 7)
    out = mmk.tensor_fusion_linear([x, y], weight, bias, presence=torch.tensor([True, False]))
    columns = weight.unflatten(1, (7, 6))[:, :, 0]
    torch.testing.assert_close(out, torch.cat([x.new_ones(4, 1), x], 1) @ columns.T + bias)
    (x, y), matrices = make(OPS["bilinear_fusion"], 4, 7)
    assert not mmk.bilinear_fusion(x, y, *matrices, rank=2, presence=torch.tensor([True, False])).any()


@each_op
def test_any_leading_dims(op: Op, backend: str) -> None:
    for lead in ((), (2, 3), (2, 0, 3)):
        xs = [leaf(*lead, w) for w in WIDTHS]
        parameters = op[1](5, torch.float32)
        check_op(op[0], xs, *parameters, presence=torch.rand(*lead, 2) > 0.4, backend=backend)


@fuzz(60)
@given(st.data())
def test_any_call_obeys_the_precision_rule(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    op, rows = draw(st.sampled_from(list(OPS.values()))), draw(st.integers(0, 120))
    xs, parameters = make(op, rows, draw(st.integers(1, 70)), dtype)
    presence = torch.rand(rows, 2) > draw(st.floats(0, 1)) if draw(st.booleans()) else torch.rand(2) > 0.5
    for backend in use_implementation(draw(st.sampled_from(FUZZED))):
        check_op(op[0], xs, *parameters, presence=presence, backend=backend)


@each_op
def test_bad_presence(op: Op) -> None:
    xs, parameters = make(op, 4, 7)
    call = functools.partial(op[0], xs, *parameters)
    for presence in (
        torch.ones(4, 3).bool(),
        torch.ones(3).bool(),
        torch.ones(4, 1, 2).bool(),
        torch.ones(1, 2).bool(),
    ):
        with pytest.raises(ValueError, match=r": presence: expected shape \(4, 2\) or \(2,\); got"):
            call(presence=presence)
    with pytest.raises(TypeError, match=r": presence: expected dtype torch.bool; got torch.int64"):
        call(presence=torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r": presence: expected a torch.Tensor; got list"):
        call(presence=[True, False])
    with pytest.raises(RuntimeError, match=rf": presence: expected the device of \S+, {HERE}; got meta"):
        call(presence=torch.ones(4, 2, dtype=torch.bool, device="meta"))


def test_the_modules_take_it() -> None:
    xs, presence = [torch.randn(4, w) for w in WIDTHS], torch.tensor([[True, False]] * 4)
    for module in (mmk.nn.LowRankFusion(WIDTHS, 7, 3), mmk.nn.TensorFusion(WIDTHS, 7)):
        assert same_bits([module([xs[0], torch.full((4, 5), torch.nan)], presence)], [module(xs, presence)])
        torch.testing.assert_close(module(xs, presence), module([xs[0], torch.zeros(4, 5)]))
