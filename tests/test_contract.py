"""What torch asks of every op, on the calls that the op states as its examples (`calls.py`).

Layouts of memory and arguments without elements are in ``test_contract_layouts.py``, forward mode in
``test_contract_forward_mode.py``, what is kept for a backward in ``test_contract_saved.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import op_contract as contract
import pytest
import torch
from agreement import agree
from calls import (
    CALLS,
    FIRST,
    Call,
    Inputs,
    each_call,
    flat,
    in_one,
    is_tensor,
    leaves_of,
    mapped,
    op_calls,
    took_the_node,
)
from conftest import native_only
from environment import DEVICE
from op_contract import gradients
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

import mmkernels as mmk

HALVES = (torch.bfloat16, torch.float16)
EXACT = [call for call in CALLS.values() if call.is_derivative()]
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
each_exact_call = pytest.mark.parametrize("call", EXACT, ids=str)


def asked(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.requires_grad_() for x in call.leaves(dtype)]


def is_its_op(call: Call, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it calls its own op, and not others and plain torch around them."""
    return [op for op, _ in op_calls(call, monkeypatch)] == [call.registered]


def other_sizes(call: Call) -> Call:
    """The call for more examples, of longer sequences."""
    return call.at(**{name: size + 2 for name, size in call.default_sizes().items() if name[0] in "BLT"})


# --- plain eager calls ------------------------------------------------------------------------------------------------


@native_only
@each_dtype
@each_call
def test_plain_calls_take_the_eager_node_and_have_the_bits_of_the_dispatcher(
    call: Call, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = asked(call, dtype)
    plain = is_its_op(call, monkeypatch) and call.registered._handle is not None
    assert took_the_node(call(*leaves)) or not plain
    with mmk.use_backend("cpu"):
        assert not took_the_node(call(*leaves))
        long = gradients(call, leaves)
    if plain:
        assert agree(gradients(call, leaves), long)
        with torch.no_grad():
            short = call(*leaves)
            with mmk.use_backend("cpu"):
                assert agree([short], [call(*leaves)])


@native_only
@each_call
def test_what_is_not_plain_goes_the_long_way(call: Call) -> None:
    leaves = asked(call)
    expected = call(*leaves)
    assert not took_the_node(call(*(x.double() for x in leaves)))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not took_the_node(call(*leaves))
    with torch.overrides.BaseTorchFunctionMode():  # it sees the call, and then makes it
        assert agree([call(*leaves)], [expected])
    transformed, _ = torch.func.vjp(call, *(x.detach() for x in leaves))
    assert agree([transformed], [expected])


@each_dtype
@each_call
def test_the_gradient_of_a_sum_is_that_of_a_number_for_every_element(call: Call, dtype: torch.dtype) -> None:
    leaves = asked(call, dtype)
    outputs = [t for t in flat(call.raw(*leaves)) if t.requires_grad]
    numbers = [torch.tensor(-2.5, dtype=t.dtype) for t in outputs]

    def pulled(arrange: Callable[[Tensor, torch.Size], Tensor]) -> list[Tensor]:
        grads = [arrange(n, t.shape) for n, t in zip(numbers, outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
        return [x for x in found if x is not None]

    assert agree(pulled(Tensor.expand), pulled(lambda n, shape: n.expand(shape).contiguous()))


@each_call
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_kernels_in_memory_threads_and_partial_gradients(
    call: Call, dtype: torch.dtype, native_isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = is_its_op(call, monkeypatch)
    for sized in (call, call.large()):
        leaves = sized.leaves(dtype)
        contract.check_every_element_is_written(sized, leaves)
        if plain:  # the roundings of plain torch depend on the number of threads
            contract.check_threads_and_runs_agree(sized, leaves)
        contract.check_each_gradient_alone(sized, leaves)


# --- derivatives ------------------------------------------------------------------------------------------------------


@each_exact_call
def test_differentiates_twice(call: Call) -> None:
    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in call.leaves()]
        first = torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for got, oracle in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), oracle, rtol=1e-3, atol=1e-4)
    small = call.small()
    contract.check_second_order(small, small.leaves())


@each_call
def test_batches_of_gradients(call: Call) -> None:
    leaves = asked(call)
    out = call(*leaves)
    grads = torch.randn(2, *out.shape)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in grads]
    for got, expected in zip(batched, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@each_call
def test_checkpoints(call: Call, either_backend: str) -> None:
    contract.check_checkpoint(call, call.leaves())


@each_call
def test_transforms_of_torch_func(call: Call, either_backend: str) -> None:
    contract.check_func(call, call.leaves())


@each_call
def test_examples_may_all_be_mapped(call: Call) -> None:
    leaves = [call.leaves(torch.float64, seed) for seed in range(3)]
    gradient = torch.func.grad(lambda *x: call(*x).sin().sum(), argnums=tuple(range(len(leaves[0]))))
    for function in (call, gradient):
        together = torch.vmap(function)(*(torch.stack(x) for x in zip(*leaves, strict=True)))
        alone = [function(*x) for x in leaves]
        for got, expected in zip(flat([together]), zip(*(flat([a]) for a in alone), strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(expected))


# --- compiled, exported, traced, cast ---------------------------------------------------------------------------------


@each_call
def test_compiles_for_any_size_as_one_graph(call: Call) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda c, *x: c(*x), fullgraph=True, dynamic=True, backend="aot_eager")
    for sized in (call, other_sizes(call)):
        leaves = sized.leaves()
        got, expected = gradients(lambda *x, c=sized: compiled(c, *x), leaves), gradients(sized, leaves)
        if call.option == "hidden states":  # whose eager way has small logits at once, the compiled one in chunks
            torch.testing.assert_close(got, expected)
        else:
            assert agree(got, expected)


def numbers_of(inputs: Inputs) -> list[Any]:
    return [value for value in inputs.values() if not list(flat(value))]


@each_call
def test_exports_for_any_size(call: Call) -> None:
    """Of more or longer examples, unless a number among the arguments says how many there are."""

    class Model(torch.nn.Module):
        def forward(self, tensors: list[Tensor]) -> Any:
            return call.with_tensors(tensors)

    first, other = (list(flat(list(c.inputs().values()))) for c in (call, other_sizes(call)))
    if numbers_of(call.inputs()) != numbers_of(other_sizes(call).inputs()):
        other = first
    dims = [
        {i: torch.export.Dim.DYNAMIC for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n}
        for a, b in zip(first, other, strict=True)
    ]
    exported = torch.export.export(Model(), (first,), dynamic_shapes=(dims,)).module()
    for tensors in (first, other):
        assert agree(list(flat(exported(tensors))), list(flat(call.with_tensors(tensors))))


def with_some_cast(call: Call) -> Iterator[Tensor]:
    """What the call gives with the tensors of one set of its arguments in bfloat16, for each set that it takes."""
    inputs = call.inputs()
    floating = [name for name, value in inputs.items() if leaves_of({name: value})]
    for count in range(len(floating), -1, -1):
        for names in itertools.combinations(floating, count):
            with contextlib.suppress(TypeError):
                yield in_one(call.public(**inputs | {n: mapped(inputs[n], Tensor.bfloat16) for n in names}))


@each_call
def test_autocast_gives_the_bits_of_arguments_that_were_cast(call: Call, either_backend: str) -> None:
    leaves = asked(call)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = call(*leaves)
    if out.dtype == torch.bfloat16:
        assert any(agree([out], [other]) for other in with_some_cast(call))
    else:  # a loss, or an op of rows, which promotes as torch's do; of products only hidden states' are cast
        torch.testing.assert_close(out, call(*leaves), rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


# Of one call of each op the trace of its derivatives is compared too, but of packed sequences: their second derivative
# runs on the reference, which goes by the values of the starts.
UNTRACED = ("test_schema", "test_autograd_registration", "test_faketensor")


@each_call
def test_passes_opcheck(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = call is FIRST[call.op] and call.op != "varlen_cross_attention"
    checks = {} if traced else {"test_utils": UNTRACED}
    for op, args in op_calls(call, monkeypatch):
        torch.library.opcheck(op.forward.overload, (*args, True), **checks)
        torch.library.opcheck(op.forward.overload, (*args, False), test_utils=UNTRACED)
        outputs, saved = op._split(op.forward(*args, True))
        grads = [torch.randn_like(t) for t in outputs]
        kept = [t.detach() for t in ([*outputs, *saved] if op._keeps_outputs(args) else saved)]
        floating = [x is not None and x.is_floating_point() for x in op._leaves(args)]
        needed = [f and i % 3 != 1 for i, f in enumerate(floating)]
        torch.library.opcheck(op.backward.overload, (grads, *args, kept, needed), **checks)


def traced(call: Call, leaves: list[Tensor]) -> fx.GraphModule:
    """The graph of the call as a function of its leaves."""
    names = ", ".join(f"x{i}" for i in range(len(leaves)))
    scope: dict[str, Any] = {"function": call.raw}
    exec(f"def traced({names}):\n    return function({names})", scope)
    return fx.symbolic_trace(scope["traced"])


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@each_call
def test_fx_records_the_op_runs_and_pickles(call: Call) -> None:
    leaves = call.leaves()
    graph = traced(call, leaves)
    assert call.public in {n.target for n in graph.graph.nodes if n.op == "call_function"}
    expected = call.raw(*leaves)
    assert equal(graph(*leaves), expected)
    assert equal(fx.symbolic_trace(graph)(*leaves), expected), "traced again"
    assert equal(pickle.loads(pickle.dumps(graph))(*leaves), expected), "pickled"


class Named(Tensor):
    """A subclass that lists the functions that were called on it."""

    called: ClassVar[list[Callable[..., Any]]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.called.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@each_call
def test_a_subclass_sees_the_call(call: Call) -> None:
    leaves = call.leaves()
    expected = call.raw(*leaves)
    for i in range(len(leaves)):
        Named.called = []
        result = call.raw(*leaves[:i], leaves[i].as_subclass(Named), *leaves[i + 1 :])
        assert call.public in Named.called, f"leaf {i}"
        assert all(type(t) is Named for t in flat(result))
        assert equal([t.as_subclass(Tensor) for t in flat(result)], expected)


@each_call
def test_a_mode_sees_the_call(call: Call) -> None:
    class Listening(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function)
            return function(*args, **(kwargs or {}))

    called: list[Callable[..., Any]] = []
    leaves = call.leaves()
    expected = call.raw(*leaves)
    with Listening():
        assert equal(call.raw(*leaves), expected)
    assert call.public in called


# --- errors -----------------------------------------------------------------------------------------------------------


WRONG: dict[str, tuple[type[Exception], Callable[[Tensor], Any]]] = {
    "text": (TypeError, lambda x: "text"),
    "complex": (TypeError, lambda x: x.to(torch.complex64)),
    "whole numbers": (TypeError, Tensor.long),
    "eight dims more": (ValueError, lambda x: x[(None,) * 8]),
    "another device": (RuntimeError, lambda x: x.to("meta")),
}


@pytest.mark.parametrize("wrong", WRONG)
@each_call
def test_what_is_wrong_is_said(call: Call, wrong: str) -> None:
    error, spoil = WRONG[wrong]
    if call.name and error is ValueError:
        pytest.skip("as torch's own function, it takes any leading dims")
    inputs = call.inputs()
    for place, tensor in enumerate(flat(list(inputs.values()))):
        if not tensor.is_floating_point() and wrong == "whole numbers":
            continue
        counted = itertools.count()
        spoilt = mapped(inputs, lambda x, c=counted, i=place: spoil(x) if next(c) == i else x, is_tensor)
        with pytest.raises(error, match=rf"^{call.public.__name__}: \w+.*: expected"):
            call.public(**spoilt)
