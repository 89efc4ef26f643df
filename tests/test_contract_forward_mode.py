"""Forward-mode AD of every op: tangents are right, whichever way they come, and none is dropped."""

from __future__ import annotations

import pytest
import torch
from calls import SMALL, Call, each_small_call
from conftest import native_only
from torch import Tensor
from torch.autograd import forward_ad

import mmkernels as mmk

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def tangents_of(leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in leaves]


def derivative(call: Call, leaves: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """Along the tangents, in float64, by differences; of gradients that are scaled by design, by the reference."""
    if not call.is_derivative():
        wide = [x.detach().double() for x in leaves]
        with mmk.use_backend("reference"):
            return torch.func.jvp(call, tuple(wide), tuple(t.double() for t in tangents))[1]
    step = 1e-6
    there, back = ([x.double() + s * t.double() for x, t in zip(leaves, tangents, strict=True)] for s in (step, -step))
    ahead, behind = call(*there), call(*back)
    return torch.where(ahead == behind, 0.0, (ahead - behind) / (2 * step))  # −inf of an idle row's LSE is constant


def assert_near(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-4 if got.dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def tangent_in(call: Call, dual: Tensor, what: str) -> Tensor:
    """A tangent that may not be dropped; what only scales gradients by design has none."""
    value, tangent = forward_ad.unpack_dual(dual)
    assert tangent is not None or not call.is_derivative(), f"the tangent of {what} is dropped"
    return torch.zeros_like(value) if tangent is None else tangent


def dual_tangent(call: Call, leaves: list[Tensor], tangents: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        out = call(*(forward_ad.make_dual(x, t) for x, t in zip(leaves, tangents, strict=True)))
        return tangent_in(call, out, "the output").detach()


@each_dtype
@each_small_call
def test_jvp_is_the_derivative(call: Call, dtype: torch.dtype) -> None:
    leaves = call.leaves(dtype)
    tangents = tangents_of(leaves)
    expected = derivative(call, leaves, tangents)
    out, got = torch.func.jvp(call, tuple(leaves), tuple(tangents))
    torch.testing.assert_close(out, call(*leaves))
    assert_near(got, expected)


@each_small_call
def test_dual_numbers_carry_tangents_whatever_requires_grad(call: Call) -> None:
    leaves = call.leaves(torch.float32)
    tangents = tangents_of(leaves)
    expected = derivative(call, leaves, tangents)
    assert_near(dual_tangent(call, leaves, tangents), expected)
    assert_near(dual_tangent(call, [x.clone().requires_grad_() for x in leaves], tangents), expected)
    with torch.no_grad():
        assert_near(dual_tangent(call, [x.clone().requires_grad_() for x in leaves], tangents), expected)
    with torch.device("cpu"):  # a mode, under which calls go through torch's dispatcher
        assert_near(dual_tangent(call, leaves, tangents), expected)


@each_small_call
def test_each_argument_alone_carries_its_tangent(call: Call) -> None:
    leaves = call.leaves(torch.float64)
    for i, tangent in enumerate(tangents_of(leaves)):

        def function(x: Tensor, i: int = i) -> Tensor:
            return call(*leaves[:i], x, *leaves[i + 1 :])

        with forward_ad.dual_level():
            got = tangent_in(call, function(forward_ad.make_dual(leaves[i], tangent)), f"leaf {i}")
        zeros = [torch.zeros_like(x) if j != i else tangent for j, x in enumerate(leaves)]
        assert_near(got, derivative(call, leaves, zeros))


@each_dtype
@each_small_call
def test_forward_and_reverse_mode_agree(call: Call, dtype: torch.dtype) -> None:
    """u · (J v) = (Jᵀ u) · v, the right side by the kernels."""
    leaves = [x.requires_grad_() for x in call.leaves(dtype)]
    tangents = tangents_of(leaves)
    out = call(*leaves)
    cotangent = tangents_of([out])[0].masked_fill(~out.detach().isfinite(), 0)
    pulled = torch.autograd.grad(out, leaves, cotangent)
    expected = sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True))
    assert isinstance(expected, Tensor)
    assert_near((cotangent * dual_tangent(call, leaves, tangents)).sum(), expected)


@each_small_call
def test_jacobians_of_both_modes_agree(call: Call) -> None:
    leaves = call.leaves(torch.float64)

    def function(x: Tensor) -> Tensor:
        return torch.where(call(x, *leaves[1:]).isfinite(), call(x, *leaves[1:]), 0)

    expected = torch.autograd.functional.jacobian(function, leaves[0])
    assert expected.abs().max() > 0
    assert_near(torch.func.jacfwd(function)(leaves[0]), expected)
    for vectorize in (False, True):
        strategy = "forward-mode" if vectorize else "reverse-mode"
        got = torch.autograd.functional.jacobian(function, leaves[0], strategy=strategy, vectorize=vectorize)
        assert_near(got, expected)


@each_small_call
def test_second_derivatives_agree(call: Call) -> None:
    leaves = call.leaves(torch.float64)

    def loss(x: Tensor) -> Tensor:
        out = call(x, *leaves[1:])
        return torch.where(out.isfinite(), out, 0).sin().sum()

    expected = torch.autograd.functional.hessian(loss, leaves[0])
    assert_near(torch.func.hessian(loss)(leaves[0]), expected)  # forward over reverse
    assert_near(torch.func.jacrev(torch.func.jacfwd(loss))(leaves[0]), expected)  # reverse over forward


@each_dtype
@each_small_call
def test_tangents_of_a_backward_pass(call: Call, dtype: torch.dtype) -> None:
    """The gradients are linear in the output's gradient: its tangent passes through the backward as the gradient would,
    where the forward ran before anything had a tangent."""
    leaves = [x.requires_grad_() for x in call.leaves(dtype)]
    out = call(*leaves)
    grad, tangent = (x.masked_fill(~out.detach().isfinite(), 0) for x in tangents_of([out, out]))
    expected = torch.autograd.grad(out, leaves, tangent, retain_graph=True)
    with forward_ad.dual_level():
        pulled = torch.autograd.grad(out, leaves, forward_ad.make_dual(grad, tangent), retain_graph=True)
        for i, (got, want) in enumerate(zip(pulled, expected, strict=True)):
            assert_near(tangent_in(call, got, f"the gradient of leaf {i}"), want)
    _, pull = torch.func.vjp(call, *(x.detach() for x in leaves))
    _, mapped = torch.func.jvp(pull, (grad,), (tangent,))
    for got, want in zip(mapped, expected, strict=True):
        assert_near(got, want)


def test_vmap_of_a_jvp_is_a_loop_of_it() -> None:
    call = SMALL["concat_linear, plain"]
    leaves = call.leaves(torch.float64)
    tangents = tangents_of(leaves)
    batched = torch.stack([leaves[0], 2 * leaves[0]])

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(call, (x, *leaves[1:]), tuple(tangents))[1]

    assert_near(torch.vmap(derivative)(batched), torch.stack([derivative(x) for x in batched]))


@native_only
def test_the_reference_is_named_with_the_reason() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    q = torch.randn(1, 1, 3, 4)
    with forward_ad.dual_level():
        for call in (
            lambda: mmk.explain("concat_linear", [forward_ad.make_dual(x, x)], w),
            lambda: mmk.explain(mmk.cross_attention, forward_ad.make_dual(q, q), q, q),
        ):
            explanation = call()
            assert explanation.backend == "reference"
            assert "forward-mode" in explanation.reasons["cpu"]
        assert "cpu" not in mmk.explain("concat_linear", [x], w).reasons, "nothing has a tangent"
        with mmk.use_backend("cpu"), pytest.raises(mmk.UnsupportedError, match=r"concat_linear.*'cpu'.*forward-mode"):
            mmk.concat_linear([forward_ad.make_dual(x, x)], w)
        with mmk.use_backend("reference"):
            out = mmk.concat_linear([forward_ad.make_dual(x, x)], w)
            assert_near(forward_ad.unpack_dual(out).tangent, x @ w.T)


def test_autocast_and_tangents() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(lambda x: mmk.concat_linear([x], w), (x,), (x,))
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), x @ w.T, rtol=2e-2, atol=2e-2)
