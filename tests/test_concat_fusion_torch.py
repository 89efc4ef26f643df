"""The concatenation-fusion ops inside torch: opcheck, compile, export, transforms, autocast, checkpoint, gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import agree
from environment import DEVICE
from fusion_cases import flat, leaf
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk
from mmkernels.testing import assert_close_to_oracle

WIDTHS = (5, 1, 6)
PRESENCE = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, True]])

Dtype = torch.dtype
Arguments = list[Any]  # of the public op and of the registered one alike: tensors, lists of them, strings, numbers


def sources(rows: int, dtype: Dtype, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    return [leaf(rows, k, dtype=dtype) for k in widths]


def linear(rows: int, dtype: Dtype) -> Arguments:
    bias, residual, gate = leaf(7, dtype=dtype), leaf(rows, 7, dtype=dtype), leaf(7, dtype=dtype)
    presence = PRESENCE.repeat((rows + 3) // 4, 1)[:rows]
    return [sources(rows, dtype), leaf(7, 12, dtype=dtype), bias, "gelu", presence, residual, gate]


def plain_linear(rows: int, dtype: Dtype) -> Arguments:
    return [sources(rows, dtype), leaf(7, 12, dtype=dtype), None, None, PRESENCE[0], None, None]


def norm_linear(norm: str, activation: str | None) -> Callable[[int, Dtype], Arguments]:
    def arguments(rows: int, dtype: Dtype) -> Arguments:
        g, h, bias = leaf(12, dtype=dtype), leaf(12, dtype=dtype), leaf(7, dtype=dtype)
        return [sources(rows, dtype), g, h, leaf(7, 12, dtype=dtype), bias, norm, 1e-2, activation]

    return arguments


def gated(gates: int, widths: tuple[int, ...]) -> Callable[[int, Dtype], Arguments]:
    def arguments(rows: int, dtype: Dtype) -> Arguments:
        weights, biases = [leaf(7, k, dtype=dtype) for k in widths], [leaf(7, dtype=dtype) for _ in widths]
        presence = PRESENCE.repeat((rows + 3) // 4, 1)[:rows, : len(widths)]
        gate = leaf(gates, sum(widths), dtype=dtype), leaf(gates, dtype=dtype)
        return [sources(rows, dtype, widths), weights, biases, *gate, presence]

    return arguments


def concat(gates: int) -> Callable[[int, Dtype], Arguments]:
    return lambda rows, dtype: [
        *sources(rows, dtype, (5, 6)),
        leaf(gates, 11, dtype=dtype),
        leaf(gates, dtype=dtype),
    ]


def call_linear(xs: Any, weight: Any, bias: Any, activation: Any, presence: Any, residual: Any, gate: Any) -> Tensor:
    options = {"activation": activation, "presence": presence, "residual": residual, "gate": gate}
    return mmk.concat_linear(xs, weight, bias, **options)


def call_norm_linear(xs: Any, g: Any, h: Any, weight: Any, bias: Any, norm: Any, eps: Any, activation: Any) -> Tensor:
    return mmk.concat_norm_linear(xs, g, h, weight, bias, norm=norm, eps=eps, activation=activation)


def call_gated(xs: Any, weights: Any, biases: Any, gate_weight: Any, gate_bias: Any, presence: Any) -> Tensor:
    return mmk.gated_fusion(xs, weights, biases, gate_weight, gate_bias, presence=presence)


# The registered op's name, how the public function is called on the same arguments, and the arguments.
CALLS: dict[str, tuple[str, Callable[..., Tensor], Callable[[int, Dtype], Arguments]]] = {
    "concat_linear": ("concat_linear", call_linear, linear),
    "concat_linear without options": ("concat_linear", call_linear, plain_linear),
    "concat_norm_linear": ("concat_norm_linear", call_norm_linear, norm_linear("layer", "silu")),
    "concat_norm_linear, rms": ("concat_norm_linear", call_norm_linear, norm_linear("rms", None)),
    "gated_fusion": ("gated_fusion", call_gated, gated(21, WIDTHS)),
    "gated_fusion, sigmoid": ("gated_fusion", call_gated, gated(7, (5, 6))),
    "gated_concat": ("gated_concat", mmk.gated_concat, concat(5)),
    "gated_concat, one gate": ("gated_concat", mmk.gated_concat, concat(1)),
}
each_call = pytest.mark.parametrize("call", CALLS)
each_op = pytest.mark.parametrize("call", ["concat_linear", "concat_norm_linear", "gated_fusion", "gated_concat"])


def prepared(call: str, rows: int = 4, dtype: Dtype = torch.float32) -> tuple[Callable[..., Tensor], Arguments]:
    _, function, arguments = CALLS[call]
    return function, arguments(rows, dtype)


def floating(arguments: Arguments) -> list[Tensor]:
    return [t for t in flat(arguments) if t.is_floating_point()]


def with_floating(arguments: Arguments, tensors: Any) -> Arguments:
    """The arguments with other floating tensors in the places of theirs."""
    rest = iter(tensors)

    def replaced(x: Any) -> Any:
        if isinstance(x, list):
            return [replaced(t) for t in x]
        return next(rest) if isinstance(x, Tensor) and x.is_floating_point() else x

    return [replaced(x) for x in arguments]


@each_op
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_opcheck_of_the_forward(call: str, training: bool, either_backend: str) -> None:
    _, arguments = prepared(call)
    if not training:
        arguments = with_floating(arguments, [x.detach() for x in floating(arguments)])
    torch.library.opcheck(getattr(torch.ops.mmkernels, CALLS[call][0]).default, (*arguments, training))


@each_op
@pytest.mark.parametrize("needs", ["all", "every other"])
def test_opcheck_of_the_backward(call: str, needs: str, either_backend: str) -> None:
    name = CALLS[call][0]
    _, arguments = prepared(call)
    detached = with_floating(arguments, [x.detach() for x in floating(arguments)])
    result = getattr(torch.ops.mmkernels, name)(*detached, True)
    out, *saved = result if isinstance(result, tuple) else (result,)
    needed = []
    for value, argument in zip(arguments, getattr(torch.ops.mmkernels, name).default._schema.arguments, strict=False):
        if "Tensor" in str(argument.type):
            needed += [x is not None and x.is_floating_point() for x in (value if isinstance(value, list) else [value])]
    if needs == "every other":
        needed = [n and i % 2 == 1 for i, n in enumerate(needed)]
    op = getattr(torch.ops.mmkernels, f"{name}_backward").default
    torch.library.opcheck(op, ([torch.randn_like(out)], *arguments, saved, needed))


@each_op
@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
def test_compile_without_a_graph_break(call: str, dynamic: bool, either_backend: str) -> None:
    torch._dynamo.reset()
    function = CALLS[call][1]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 9):
        _, arguments = prepared(call, rows)
        got, want = compiled(*arguments), function(*arguments)
        assert agree([got], [want])
        leaves = floating(arguments)
        first, second = (torch.autograd.grad(y.sin().sum(), leaves) for y in (got, want))
        assert agree(first, second)


def test_inductor_compiles_a_chain_of_all_ops(either_backend: str) -> None:
    def model(xs: list[Tensor], weight: Tensor, h: Tensor) -> Tensor:
        y = mmk.concat_linear([x * 2 for x in xs], weight, activation="gelu")
        y = mmk.concat_norm_linear([y, *xs], h, None, weight.new_ones(7, 19), norm="rms").relu()
        y = mmk.gated_fusion([y, xs[0]], [weight.new_ones(7, 7), weight[:, :5]], None, weight)
        return mmk.gated_concat(y, xs[2], y.new_ones(1, 13)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    leaves = [*sources(4, torch.float32), leaf(7, 12), leaf(19)]
    got, want = compiled(leaves[:3], *leaves[3:]), model(leaves[:3], *leaves[3:])
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_op
@pytest.mark.parametrize("strict", [False, True], ids=["by tracing", "strict"])
def test_export_with_a_dynamic_batch(call: str, strict: bool) -> None:
    function, arguments = prepared(call)
    count = 3 if isinstance(arguments[0], list) else 2

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parameters_of_it = [x.detach() for x in floating(arguments)[count:]]

        def forward(self, *xs: Tensor) -> Tensor:
            tensors = [*xs, *self.parameters_of_it]
            if call == "concat_linear":  # its residual and presence have the rows of the example
                weight, bias, _, gate = self.parameters_of_it
                return function(list(xs), weight, bias, "gelu", PRESENCE[0], None, gate)
            replaced = with_floating(arguments, tensors)
            return function(*(x if x is not arguments[-1] or call != "gated_fusion" else PRESENCE[0] for x in replaced))

    xs = tuple(x.detach() for x in floating(arguments)[:count])
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in xs),)
    exported = torch.export.export(Model(), xs, dynamic_shapes=shapes, strict=strict).module()
    more = [torch.randn(11, x.shape[1]) for x in xs]
    assert torch.equal(exported(*more), Model()(*more))


@each_call
def test_func_grad_agrees_with_autograd(call: str, either_backend: str) -> None:
    function, arguments = prepared(call)
    leaves = floating(arguments)

    def loss(*tensors: Tensor) -> Tensor:
        return function(*with_floating(arguments, tensors)).sin().sum()

    got = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*(x.detach() for x in leaves))
    assert agree(got, torch.autograd.grad(loss(*leaves), leaves))


@each_call
@pytest.mark.parametrize("mapped", ["inputs", "everything", "every other"])
def test_vmap_of_the_gradient_equals_a_loop(call: str, mapped: str, either_backend: str) -> None:
    function, arguments = prepared(call)
    tensors = [x.detach() for x in floating(arguments)]
    count = 3 if isinstance(arguments[0], list) else 2
    which = {"inputs": range(count), "everything": range(len(tensors)), "every other": range(0, len(tensors), 2)}
    in_dims = tuple(0 if i in which[mapped] else None for i in range(len(tensors)))
    inputs = [x if d is None else torch.randn(3, *x.shape) for x, d in zip(tensors, in_dims, strict=True)]

    def gradients(*x: Tensor) -> tuple[Tensor, ...]:
        def loss(*x: Tensor) -> Tensor:
            return function(*with_floating(arguments, x)).sin().sum()

        return torch.func.grad(loss, argnums=tuple(range(len(x))))(*x)

    got = torch.vmap(gradients, in_dims=in_dims)(*inputs)
    pairs = list(zip(inputs, in_dims, strict=True))
    examples = [gradients(*(x if d is None else x[i] for x, d in pairs)) for i in range(3)]
    for batched, one_by_one in zip(got, zip(*examples, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)


@each_call
def test_gradcheck_and_gradgradcheck_in_float64(call: str) -> None:
    function, arguments = prepared(call, dtype=torch.float64)
    with mmk.use_backend("reference"):

        def f(*tensors: Tensor) -> Tensor:
            return function(*with_floating(arguments, tensors))

        assert torch.autograd.gradcheck(f, floating(arguments))
        assert torch.autograd.gradgradcheck(f, floating(arguments), fast_mode=True)


@each_call
def test_second_derivatives(call: str, either_backend: str) -> None:
    function, arguments = prepared(call)

    def second(dtype: Dtype, name: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in floating(arguments)]
        with mmk.use_backend(name):
            y = function(*with_floating(arguments, leaves))
            first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours, plain = second(torch.float32, either_backend), second(torch.float32, "reference")
    exact = second(torch.float64, "reference")
    largest = max(float(x.abs().max()) for x in exact)
    factor = 2.0 if DEVICE == "cpu" else 16.0  # three tf32 products lose bits that torch's float32 ones keep
    for got, same_dtype, oracle in zip(ours, plain, exact, strict=True):
        assert_close_to_oracle(got, same_dtype, oracle, name="second derivative", scale=largest, factor=factor)


@each_op
def test_autocast_casts_every_tensor(call: str, either_backend: str) -> None:
    function, arguments = prepared(call)
    halves = with_floating(arguments, [x.detach().bfloat16() for x in floating(arguments)])
    with torch.autocast(DEVICE, torch.bfloat16):
        y = function(*arguments)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, function(*halves))
    leaves = floating(arguments)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), leaves))
    with mmk.use_backend("reference"), torch.autocast(DEVICE, torch.bfloat16):
        assert function(*with_floating(arguments, [x.double() for x in leaves])).dtype == torch.float64


@each_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(call: str, reentrant: bool, either_backend: str) -> None:
    function, arguments = prepared(call)
    leaves = floating(arguments)

    def run(*tensors: Tensor) -> Tensor:
        return function(*with_floating(arguments, tensors))

    want = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    for x in leaves:
        x.grad = None
    checkpoint(run, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert agree([x.grad for x in leaves if x.grad is not None], want)


@each_op
def test_meta_and_fake_tensors_have_the_shape_of_real_ones(call: str) -> None:
    function, arguments = prepared(call)
    want = function(*arguments).shape
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    meta = [[t.to("meta") for t in x] if isinstance(x, list) else x for x in meta]
    assert function(*meta).shape == want


@each_op
def test_a_tuple_of_modalities_is_as_good_as_a_list(call: str, either_backend: str) -> None:
    function, arguments = prepared(call)
    tuples = [tuple(x) if isinstance(x, list) else x for x in arguments]
    assert torch.equal(function(*tuples), function(*arguments))
