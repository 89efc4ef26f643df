"""Any memory layout of any tensor argument, and arguments without elements, in every op.

`mmkernels.testing.inputs.CALLS` has one line for each way to call an op, with inputs of given sizes, every optional
tensor among them. What holds for all of them is tested from that line.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from conftest import EITHER, Implementation, use_implementation
from environment import DEVICE
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing.inputs import CALLS, LAYOUTS, Inputs, Layout, converted, function_of

# Arguments whose values say which calls are valid, so that only layouts that keep the values are tried.
FIXED = {"cu_seqlens_q", "cu_seqlens_k", "mask"}


# --- layouts ----------------------------------------------------------------------------------------------------------


EXPANDING: dict[str, Layout] = {
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one column expanded": lambda x: x[..., :1].expand_as(x),
    "one element expanded": lambda x: x.flatten()[:1].view([1] * x.dim()).expand_as(x),
}
EMPTY: dict[str, Layout] = {
    "contiguous": lambda x: x,
    "transposed": LAYOUTS["transposed"],
    "a column of a matrix": LAYOUTS["a column of a matrix"],
    "expanded": lambda x: x.new_zeros([1] * x.dim()).expand(x.shape),
    "odd strides": lambda x: x.new_zeros(0).as_strided(x.shape, [7] * x.dim()),
}


def at(inputs: Inputs) -> Iterator[tuple[str, int | None]]:
    """Where the tensors are among the arguments."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            yield name, None
        elif isinstance(value, list):
            yield from ((name, i) for i in range(len(value)))


def replaced(inputs: Inputs, place: tuple[str, int | None], layout: Layout) -> Inputs:
    name, i = place
    value = inputs[name]
    return {**inputs, name: layout(value) if i is None else [*value[:i], layout(value[i]), *value[i + 1 :]]}


def prepared(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Inputs:
    torch.manual_seed(1)
    return converted(CALLS[name](**sizes), dtype, DEVICE)


def outputs_of(name: str, inputs: Inputs) -> list[Tensor]:
    out = function_of(name)(**inputs)
    return list(out) if isinstance(out, (list, tuple)) else [out]


def results(name: str, inputs: Inputs, gradient: Layout = lambda g: g) -> list[Tensor]:
    """Outputs and the gradients of every floating argument, as it lies in memory."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    for place in list(at(inputs)):
        inputs = replaced(inputs, place, leaf)
    outs = outputs_of(name, inputs)
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
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


# --- what holds for all ----------------------------------------------------------------------------------------------

DOOR = Implementation("the choice")  # none is forced: plain calls take the short way in
WAYS = [pytest.param(DOOR, id="unforced"), *EITHER]
each_op = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """No backend forced, then one after the other."""
    if request.param is DOOR:
        yield "any"
    else:
        yield from use_implementation(request.param)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_argument_in_every_layout(name: str, dtype: torch.dtype, way: str) -> None:
    inputs = prepared(name, dtype)
    expected = results(name, inputs)
    for place in at(inputs):
        for text, layout in LAYOUTS.items():
            assert_same(results(name, replaced(inputs, place, layout)), expected, f"{place} {text}")
        for text, layout in EXPANDING.items() if place[0] not in FIXED else ():
            arranged = replaced(inputs, place, layout)
            dense = replaced(arranged, place, Tensor.contiguous)
            assert_same(results(name, arranged), results(name, dense), f"{place} {text}")


@each_op
def test_all_arguments_and_gradients_in_a_layout(name: str, way: str) -> None:
    inputs = prepared(name)
    for text, layout in {**LAYOUTS, **EXPANDING}.items():
        arranged = inputs
        if text in LAYOUTS:
            for place in at(inputs):
                arranged = replaced(arranged, place, layout)
        dense = results(name, inputs, lambda g, f=layout: f(g).contiguous())
        assert_same(results(name, arranged, layout), dense, text)


def _without(name: str) -> list[str]:
    return list(inspect.signature(CALLS[name]).parameters)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in CALLS for size in _without(name)])
def test_arguments_without_elements(name: str, size: str, way: str) -> None:
    """The reference's result in any strides, or its complaint, and that is about a value."""
    inputs = prepared(name, **{size: 0})
    with mmk.use_backend("reference"):
        try:
            expected = results(name, inputs)
        except ValueError as error:
            expected = []
            assert str(error).startswith(name.split(" ")[0])
    for text, layout in EMPTY.items():
        arranged = inputs
        for place in at(inputs):
            arranged = replaced(arranged, place, lambda x, f=layout: x if x.numel() else f(x))
        with nullcontext() if expected else pytest.raises(ValueError, match=f"^{name.split(' ')[0]}: "):
            # The incoming gradient too: that of a sum is expanded, also where it has no elements.
            for arrange in (layout, EMPTY["expanded"]):
                got = results(name, arranged, lambda g, f=arrange: g if g.numel() else f(g))
                assert_same(got, expected, text)


@each_op
def test_layouts_under_compile(name: str) -> None:
    tensors = {place: None for place in at(prepared(name))}
    compiled = torch.compile(lambda inputs: outputs_of(name, inputs), fullgraph=True, backend="aot_eager")
    for layout in (LAYOUTS["a column of a matrix"], LAYOUTS["transposed"]):
        inputs = prepared(name)
        expected = [o.detach() for o in outputs_of(name, inputs)]
        for place in tensors:
            inputs = replaced(inputs, place, layout)
        torch._dynamo.reset()
        assert_same([o.detach() for o in compiled(inputs)], expected, "compiled")


# --- presence with dynamic rows ---------------------------------------------------------------------------------------

ROWS = {"xs", "x", "y", "query", "residual", "presence", "value", "sampling_locations", "attention_weights", "logits"}
ROWS |= {"labels"}
WITH_PRESENCE = [name for name in CALLS if "presence" in CALLS[name]() and CALLS[name]()["presence"].dim() == 2]


@pytest.mark.parametrize("name", WITH_PRESENCE)
def test_export_with_dynamic_rows_and_a_presence_per_row(name: str) -> None:
    """For any number of rows, that of the modalities among them."""

    class Model(torch.nn.Module):
        def __init__(self, constant: Inputs) -> None:
            super().__init__()
            self.constant = constant

        def forward(self, rows: Inputs) -> list[Tensor]:
            return outputs_of(name, {**self.constant, **rows})

    def split(count: int) -> tuple[Inputs, Inputs]:
        inputs = prepared(name, B=count)
        by_row = set(inputs) & ROWS
        return {k: v for k, v in inputs.items() if k not in by_row}, {k: inputs[k] for k in by_row}

    constant, rows = split(9)
    batch = torch.export.Dim("batch")
    shapes = {k: [{0: batch} for _ in v] if isinstance(v, list) else {0: batch} for k, v in rows.items()}
    exported = torch.export.export(Model(constant), (rows,), dynamic_shapes=(shapes,)).module()
    for count in (2, 3, 9, 17):
        _, rows = split(count)
        assert_same(exported(rows), outputs_of(name, {**constant, **rows}), f"{count} rows")


def test_export_with_dynamic_rows_of_modulated_norm() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return mmk.modulated_norm(x, shift, scale)

    batch, length, r = torch.export.Dim("batch"), torch.export.Dim("length"), torch.randn
    for per_token in (False, True):
        made = [(r(n, m, 6), *(r(n, m, 6) if per_token else r(n, 6) for _ in range(2))) for n, m in ((6, 4), (4, 6))]
        shape = {0: batch, 1: length} if per_token else {0: batch}
        exported = torch.export.export(Model(), made[0], dynamic_shapes=({0: batch, 1: length}, shape, shape)).module()
        torch.testing.assert_close(exported(*made[1]), mmk.modulated_norm(*made[1]))
