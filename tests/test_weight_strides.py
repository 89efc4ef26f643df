"""Weights that are views of others: transposed, or a part of a wider matrix. Products read them where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fusion_cases import allocations
from torch import Tensor

import mmkernels as mmk
from mmkernels import _native
from mmkernels.testing import assert_close_to_oracle
from mmkernels.testing.inputs import CALLS

WEIGHTS = frozenset(
    {"weight", "value_weights", "gate_weight", "factors", "query_weight", "weight1", "weight2", "x_weight", "y_weight"}
)
# norm_rotary's are factors of features, of one dim.
PRODUCTS = [name for name in CALLS if WEIGHTS & set(CALLS[name]()) and not name.startswith("norm_rotary")]
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
    "one row": dict(B=1, K=37, N=33, D=37, A=33),
    "a few rows": dict(B=9, K=70, N=80, D=40, A=64),
    "many rows": dict(B=150, K=41, N=70, D=24, A=35),
}


def sized(name: str, sizes: dict[str, int]) -> dict[str, Any]:
    make = CALLS[name]
    known = make.__code__.co_varnames[: make.__code__.co_argcount]
    return make(**{k: v for k, v in sizes.items() if k in known})


def arranged(inputs: dict[str, Any], dtype: torch.dtype, layout: Layout) -> tuple[dict[str, Any], list[Tensor]]:
    """The inputs in a dtype, matrices among the weights in a layout, and all leaves."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor, weight: bool) -> Tensor:
        if not x.is_floating_point():
            return x
        x = layout(x.to(dtype)) if weight else x.to(dtype)
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    def of(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(x, name in WEIGHTS) for x in value]
        return leaf(value, name in WEIGHTS) if isinstance(value, Tensor) else value

    return {name: of(name, value) for name, value in inputs.items()}, leaves


def flat(results: Any) -> Iterator[Tensor]:
    for result in results if isinstance(results, (list, tuple)) else (results,):
        if isinstance(result, Tensor):
            yield result
        else:
            yield from flat(result)


def run(name: str, inputs: dict[str, Any], dtype: torch.dtype, layout: Layout) -> list[Tensor]:
    """Outputs and gradients of all leaves."""
    arguments, leaves = arranged(inputs, dtype, layout)
    outputs = [x for x in flat(getattr(mmk, name.split(" ")[0])(**arguments)) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in outputs]
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
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_layout_of_a_weight_changes_no_value(name: str, sizes: str, dtype: torch.dtype) -> None:
    inputs = sized(name, SIZES[sizes])
    rounded = {
        k: [x.to(dtype) if x.is_floating_point() else x for x in v]
        if isinstance(v, list)
        else v.to(dtype)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in inputs.items()
    }
    oracle = run(name, rounded, torch.float64, lambda x: x)
    with mmk.use_backend("reference"):
        plain = run(name, rounded, dtype, lambda x: x)
    for layout in LAYOUTS:
        got = run(name, rounded, dtype, layout)
        for i, (actual, same, exact) in enumerate(zip(got, plain, oracle, strict=True)):
            assert_close_to_oracle(actual, same, exact, name=f"{layout.__name__}, result {i}")


@pytest.mark.skipif(not ISAS, reason="the compiled library is absent")
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_transposed_weight_is_not_copied(name: str) -> None:
    """Forward and backward allocate the same number of tensors of the same sizes as for an ordinary weight."""
    inputs = sized(name, dict(B=3, K=41, N=70, D=24, A=35))

    def tensors(layout: Layout) -> list[list[int]]:
        arguments, leaves = arranged(inputs, torch.float32, layout)
        call = partial(getattr(mmk, name.split(" ")[0]), **arguments)
        outputs = [x for x in flat(call()) if x.requires_grad]
        grads = [torch.ones_like(x) for x in outputs]
        backward = allocations(lambda: torch.autograd.grad(outputs, leaves, grads))
        return [sorted(allocations(call)), sorted(backward)]

    assert tensors(transposed) == tensors(lambda x: x)


@pytest.mark.skipif(not ISAS, reason="the compiled library is absent")
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_transposed_parameter_gets_a_gradient_in_its_own_order(name: str) -> None:
    """So that accumulating it costs no copy."""
    arguments, leaves = arranged(sized(name, SIZES["a few rows"]), torch.float32, transposed)
    outputs = [x for x in flat(getattr(mmk, name.split(" ")[0])(**arguments)) if x.requires_grad]
    weights = [x for k in sorted(WEIGHTS & set(arguments)) for x in flat(arguments[k])]
    grads = torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs])
    assert [g.stride() for g in grads] == [w.stride() for w in weights]
