"""`DifferentiableOp`: what an op with lists of tensors gets from its reference alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels._differentiable import DifferentiableOp


def product_of(xs: list[Tensor], weight: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor]:
    return (torch.cat(xs, -1) @ weight.T * scale,)


def reference(xs: list[Tensor], weight: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    (product,) = product_of(xs, weight, bias, scale)
    return torch.tanh(product if bias is None else product + bias), product.sum(-1)


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None
    scale: float


def fake(a: Arguments) -> tuple[Tensor, ...]:
    rows = a.xs[0].shape[:-1]
    out = a.xs[0].new_empty((*rows, a.weight.shape[0]))
    return out, a.xs[0].new_empty(rows), torch.empty_like(out)


toy_op = DifferentiableOp(
    "toy_for_tests",
    Arguments,
    outputs="Tensor out, Tensor total",
    saved="Tensor product",
    reference=reference,
    reference_saved=product_of,
    fake=fake,
)


def toy(xs: list[Tensor], weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    return toy_op(xs, weight, bias, 0.5)


def leaves(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    xs = [torch.randn(5, width, dtype=dtype, requires_grad=True) for width in (3, 0, 2)]
    return xs, torch.randn(4, 5, dtype=dtype, requires_grad=True), torch.randn(4, dtype=dtype, requires_grad=True)


def test_first_and_second_gradients() -> None:
    xs, weight, bias = leaves()

    def flat(*args: Tensor) -> tuple[Tensor, ...]:
        return toy(list(args[:3]), *args[3:])

    assert torch.autograd.gradcheck(flat, (*xs, weight, bias))
    assert torch.autograd.gradgradcheck(flat, (*xs, weight, bias))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_opcheck(with_bias: bool) -> None:
    xs, weight, bias = leaves()
    arguments = (xs, weight, bias if with_bias else None, 0.5)
    torch.library.opcheck(torch.ops.mmkernels.toy_for_tests.default, (*arguments, True))
    torch.library.opcheck(torch.ops.mmkernels.toy_for_tests.default, (*arguments, False))
    out, total, product = (t.detach() for t in toy_op.forward(*arguments, True))
    backward = ([torch.randn_like(out), torch.randn_like(total)], *arguments, [product])
    needed = [True, False, True, True, with_bias]
    torch.library.opcheck(torch.ops.mmkernels.toy_for_tests_backward.default, (*backward, needed))


def test_a_gradient_of_one_output_and_of_some_inputs() -> None:
    xs, weight, bias = leaves()
    xs[0].requires_grad_(False)
    _, total = toy(xs, weight, bias)
    got = torch.autograd.grad(total.sum(), (xs[2], weight))
    want = torch.autograd.grad(reference(xs, weight, bias, 0.5)[1].sum(), (xs[2], weight))
    assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))


def test_transforms_see_through_lists() -> None:
    xs, weight, bias = ([x.detach() for x in leaves()[0]], *(x.detach() for x in leaves()[1:]))
    batch = torch.randn(6, 5, 3, dtype=torch.float64)

    def loss(function: Any, w: Tensor, x: Tensor) -> Tensor:
        return function([x, xs[1], xs[2]], w, bias)[0].sum()

    def plain(xs: list[Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference(xs, weight, bias, 0.5)

    for transform in (
        lambda f: torch.vmap(lambda w, x: loss(f, w, x), (None, 0))(weight, batch),
        lambda f: torch.vmap(torch.func.grad(lambda w, x: loss(f, w, x)), (None, 0))(weight, batch),
        lambda f: torch.func.jacrev(torch.func.grad(lambda w: loss(f, w, batch[0])))(weight),
    ):
        torch.testing.assert_close(transform(toy), transform(plain))


def test_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, dynamic=True, backend="aot_eager")
    for _ in range(2):
        xs, weight, bias = leaves()
        got, want = compiled(xs, weight, bias), toy(xs, weight, bias)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(sum(o.sum() for o in outs), (*xs, weight, bias)) for outs in (got, want)]
        torch.testing.assert_close(*grads)


def test_explains_that_there_is_no_kernel() -> None:
    xs, weight, _ = leaves(torch.float32)
    explanation = mmk.explain(toy, xs, weight)
    assert explanation.backend == "reference"
    assert "cpu" in explanation.reasons
