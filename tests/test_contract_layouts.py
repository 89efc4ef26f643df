"""Any memory layout of any tensor argument, and arguments without elements, in every op."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from calls import CALLS, FIRST, Call, Inputs, each_call, flat, is_tensor, leaves_of, mapped
from conftest import EITHER, Implementation, use_implementation
from torch import Tensor

import mmkernels as mmk

Layout = Callable[[Tensor], Tensor]

# --- layouts ----------------------------------------------------------------------------------------------------------


def _with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


KEEPING: dict[str, Layout] = {
    "within wider rows": _with_gaps,
    "a column of a matrix": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": _transposed,
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
EXPANDING: dict[str, Layout] = {
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[..., :1].expand_as(x),
    "one element expanded": lambda x: x.flatten()[:1].view([1] * x.dim()).expand_as(x),
}
EMPTY: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "a column of a matrix": KEEPING["a column of a matrix"],
    "expanded": lambda x: x.new_zeros([1] * x.dim()).expand(x.shape),
    "odd strides": lambda x: x.new_zeros(0).as_strided(x.shape, [7] * x.dim()),
}


def at(inputs: Inputs) -> Iterator[tuple[str, int | None]]:
    """Where the tensors of one dim and more are among the arguments."""
    for name, value in inputs.items():
        if is_tensor(value) and value.dim():
            yield name, None
        elif isinstance(value, list):
            yield from ((name, i) for i, x in enumerate(value) if is_tensor(x))


def replaced(inputs: Inputs, place: tuple[str, int | None], layout: Layout) -> Inputs:
    name, i = place
    value = inputs[name]
    return {**inputs, name: layout(value) if i is None else [*value[:i], layout(value[i]), *value[i + 1 :]]}


def outputs_of(call: Call, inputs: Inputs) -> list[Tensor]:
    return list(flat(call.public(**inputs)))


def results(call: Call, inputs: Inputs, gradient: Layout = lambda g: g) -> list[Tensor]:
    """Outputs and the gradients of every floating argument, as it lies in memory."""
    inputs = mapped(inputs, lambda x: x.detach().requires_grad_())
    leaves = leaves_of(inputs)
    outs = outputs_of(call, inputs)
    torch.manual_seed(2)
    grads = [torch.randn(o.shape).to(o.device, o.dtype) for o in outs]
    grads = [gradient(g) if g.dim() else g for g in grads]
    pulled = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    pairs = zip(leaves, pulled, strict=True)
    return [*(o.detach() for o in outs), *(torch.zeros_like(x) if g is None else g for x, g in pairs)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        tolerance = 1e-4 if b.dtype == torch.float32 else 3e-2
        largest = max(1.0, float(b.abs().nan_to_num(0, 0).max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest, msg=lambda m: f"{what}: {m}")


# --- what holds for all ----------------------------------------------------------------------------------------------

DOOR = Implementation("the choice")  # none is forced: plain calls take the short way in
SIZED = [*CALLS, *(f"{name}, large" for name in CALLS)]
WAYS = [pytest.param(DOOR, id="unforced"), *EITHER]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """No backend forced, then one after the other."""
    if request.param is DOOR:
        yield "any"
    else:
        yield from use_implementation(request.param)


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_argument_in_every_layout(call: Call, dtype: torch.dtype, way: str) -> None:
    inputs = call.inputs(dtype)
    expected = results(call, inputs)
    for place in at(inputs):
        for text, layout in KEEPING.items():
            assert_same(results(call, replaced(inputs, place, layout)), expected, f"{place} {text}")
        for text, layout in EXPANDING.items():
            arranged = replaced(inputs, place, layout)
            try:
                dense = results(call, replaced(arranged, place, Tensor.contiguous))
            except ValueError:  # a mask or offsets whose values say which calls are valid
                with pytest.raises(ValueError, match=f"^{call.public.__name__}: {place[0]}"):
                    results(call, arranged)
                continue
            assert_same(results(call, arranged), dense, f"{place} {text}")


@pytest.mark.parametrize("call", [*CALLS.values(), *(call.large() for call in CALLS.values())], ids=SIZED)
def test_all_arguments_and_gradients_in_a_layout(call: Call, way: str) -> None:
    inputs = call.inputs()
    for text, layout in {**KEEPING, **EXPANDING}.items():
        arranged = inputs
        if text in KEEPING:
            for place in at(inputs):
                arranged = replaced(arranged, place, layout)
        dense = results(call, inputs, lambda g, f=layout: f(g).contiguous())
        assert_same(results(call, arranged, layout), dense, text)


def _shapes(call: Call) -> list[torch.Size]:
    return [x.shape for x in flat(list(call.inputs().values()))]


EMPTIED = {
    f"{call} without {size}": empty
    for call in CALLS.values()
    for size in call.default_sizes()
    if _shapes(empty := call.at(**{size: 0})) != _shapes(call)
}


@pytest.mark.parametrize("call", EMPTIED.values(), ids=EMPTIED)
def test_arguments_without_elements(call: Call, way: str) -> None:
    """The reference's result in any strides, or its complaint, and that is about a value."""
    inputs = call.inputs()
    complaint = f"^{call.public.__name__}: "
    with mmk.use_backend("reference"):
        try:
            expected = results(call, inputs)
        except ValueError as error:
            expected = []
            assert re.match(complaint, str(error))
    for text, layout in EMPTY.items():
        arranged = inputs
        for place in at(inputs):
            arranged = replaced(arranged, place, lambda x, f=layout: x if x.numel() else f(x))
        with nullcontext() if expected else pytest.raises(ValueError, match=complaint):
            # The incoming gradient too: that of a sum is expanded, also where it has no elements.
            for arrange in (layout, EMPTY["expanded"]):
                got = results(call, arranged, lambda g, f=arrange: g if g.numel() else f(g))
                assert_same(got, expected, text)


@pytest.mark.parametrize("call", FIRST.values(), ids=str)
def test_layouts_under_compile(call: Call) -> None:
    compiled = torch.compile(lambda inputs: outputs_of(call, inputs), fullgraph=True, backend="aot_eager")
    for layout in (KEEPING["a column of a matrix"], KEEPING["transposed"]):
        inputs = call.inputs()
        expected = outputs_of(call, inputs)
        torch._dynamo.reset()
        arranged = mapped(inputs, layout, lambda x: is_tensor(x) and x.dim())
        assert_same(compiled(arranged), expected, "compiled")
