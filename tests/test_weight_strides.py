"""Weights that are views of others: transposed, or a part of a wider matrix. Products read them where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from calls import CALLS, Call, Inputs, flat, leaves_of, mapped
from fusion_cases import allocations
from torch import Tensor

import mmkernels as mmk
from mmkernels import _native
from mmkernels.testing import assert_close_to_oracle

each_product = pytest.mark.parametrize("call", [call for call in CALLS.values() if call.weights()], ids=str)
ISAS = [isa for isa in _native.supported_isas() if isa != "emulated"]

Layout = Callable[[Tensor], Tensor]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def part_of_transposed(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-2], x.shape[-1] + 3, x.shape[-2] + 5), torch.nan)
    wide[..., 1 : 1 + x.shape[-1], 2 : 2 + x.shape[-2]] = x.mT
    return wide[..., 1 : 1 + x.shape[-1], 2 : 2 + x.shape[-2]].mT


def columns_of_wider(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 7), torch.nan)
    wide[..., 3 : 3 + x.shape[-1]] = x
    return wide[..., 3 : 3 + x.shape[-1]]


def every_second_row(x: Tensor) -> Tensor:
    taller = x.new_full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1]), torch.nan)
    taller[..., ::2, :] = x
    return taller[..., ::2, :]


def neither_dense(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


LAYOUTS: list[Layout] = [transposed, part_of_transposed, columns_of_wider, every_second_row, neither_dense]
SIZES = {
    "one row": dict(B=1, K=37, Kx=37, Ky=21, N=33, D=37, A=33),
    "a few rows": dict(B=9, K=70, Kx=70, Ky=33, N=80, D=40, A=64),
    "many rows": dict(B=150, K=41, Kx=41, Ky=37, N=70, D=24, A=35),
}


def unchanged(x: Tensor) -> Tensor:
    return x


def arranged(call: Call, inputs: Inputs, layout: Layout) -> tuple[Inputs, list[Tensor]]:
    """The inputs with weights in a layout, and all leaves."""
    layouts = {name: layout if name in call.weights() else unchanged for name in inputs}
    inputs = {name: mapped(x, lambda x, n=name: layouts[n](x).detach().requires_grad_()) for name, x in inputs.items()}
    return inputs, leaves_of(inputs)


def run(call: Call, inputs: Inputs, layout: Layout) -> list[Tensor]:
    """Outputs and gradients of all leaves."""
    arguments, leaves = arranged(call, inputs, layout)
    outputs = [x for x in flat(call.public(**arguments)) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, leaves, grads))


@pytest.fixture(params=ISAS)
def every_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.isa()
    _native.set_isa(request.param)
    yield
    _native.set_isa(before)


@pytest.mark.skipif(not ISAS, reason="the compiled library is absent")
@pytest.mark.usefixtures("every_isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@each_product
def test_the_layout_of_a_weight_changes_no_value(call: Call, sizes: str, dtype: torch.dtype) -> None:
    inputs = call.at(**SIZES[sizes]).inputs(dtype)
    oracle = run(call, mapped(inputs, Tensor.double), unchanged)
    with mmk.use_backend("reference"):
        plain = run(call, inputs, unchanged)
    for layout in LAYOUTS:
        got = run(call, inputs, layout)
        for i, (actual, same, exact) in enumerate(zip(got, plain, oracle, strict=True)):
            assert_close_to_oracle(actual, same, exact, name=f"{layout.__name__}, result {i}")


@pytest.mark.skipif(not ISAS, reason="the compiled library is absent")
@each_product
def test_a_transposed_weight_is_not_copied(call: Call) -> None:
    """Forward and backward allocate the same number of tensors of the same sizes as for an ordinary weight."""
    inputs = call.at(B=3, K=41, Kx=41, Ky=37, N=70, D=24, A=35).inputs()

    def tensors(layout: Layout) -> list[list[int]]:
        arguments, leaves = arranged(call, inputs, layout)
        function = partial(call.public, **arguments)
        outputs = [x for x in flat(function()) if x.requires_grad]
        grads = [torch.ones_like(x) for x in outputs]
        backward = allocations(lambda: torch.autograd.grad(outputs, leaves, grads))
        return [sorted(allocations(function)), sorted(backward)]

    assert tensors(transposed) == tensors(unchanged)


@pytest.mark.skipif(not ISAS, reason="the compiled library is absent")
@each_product
def test_a_transposed_parameter_gets_a_gradient_in_its_own_order(call: Call) -> None:
    """So that accumulating it costs no copy."""
    arguments, _ = arranged(call, call.at(**SIZES["a few rows"]).inputs(), transposed)
    outputs = [x for x in flat(call.public(**arguments)) if x.requires_grad]
    weights = list(flat([arguments[name] for name in call.weights()]))
    weights = [x for x in weights if x.requires_grad]
    grads = torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])
    assert [g.stride() for g in grads] == [w.stride() for w in weights]
