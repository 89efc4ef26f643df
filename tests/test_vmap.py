"""vmap of ops with weights over many small examples: batched products, and not a call for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_weight_strides import PRODUCTS, WEIGHTS, flat, sized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels as mmk

Loss = Callable[..., Tensor]

MANY = 64
SMALL = dict(B=2, K=6, N=5, D=6, A=5)
PRESENCE = ["concat_linear", "gated_fusion", "bilinear_fusion", "low_rank_fusion", "tensor_fusion_linear"]


class Calls(TorchDispatchMode):
    """Counts what torch is asked for below every transform."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def loss_of(name: str) -> tuple[Loss, list[Tensor], list[bool]]:
    """A function of the floating tensors of a call, these, and which of them are weights."""
    inputs = sized(name, SMALL)
    leaves: list[Tensor] = []
    weights: list[bool] = []
    for argument, value in inputs.items():
        found = [x for x in flat(value) if x.is_floating_point()] if isinstance(value, (list, Tensor)) else []
        leaves += [x.double() for x in found]  # so that nothing but the batching is tested
        weights += [argument in WEIGHTS or "bias" in argument or "norm" in argument for _ in found]

    def loss(*tensors: Tensor) -> Tensor:
        left = iter(tensors)

        def replaced(value: Any) -> Any:
            if isinstance(value, list):
                return [replaced(x) for x in value]
            return next(left) if isinstance(value, Tensor) and value.is_floating_point() else value

        result = getattr(mmk, name.split(" ")[0])(**{k: replaced(v) for k, v in inputs.items()})
        return torch.stack([x.sin().sum() for x in flat(result) if x.is_floating_point()]).sum()

    return loss, leaves, weights


def per_example(name: str, examples: int, all_mapped: bool) -> tuple[Callable[[], Any], list[tuple[Tensor, ...]]]:
    """vmap of the gradients of all leaves, and the same one by one."""
    loss, leaves, weights = loss_of(name)
    torch.manual_seed(2)
    dims = [0 if all_mapped or not w else None for w in weights]
    inputs = [
        x if dim is None else torch.randn(examples, *x.shape, dtype=x.dtype)
        for x, dim in zip(leaves, dims, strict=True)
    ]
    gradients = torch.func.grad(loss, argnums=tuple(range(len(leaves))))
    pairs = list(zip(inputs, dims, strict=True))
    alone = [gradients(*(x if d is None else x[i] for x, d in pairs)) for i in range(examples)]
    return lambda: torch.vmap(gradients, in_dims=tuple(dims))(*inputs), alone


@pytest.mark.parametrize("all_mapped", [False, True], ids=["weights shared", "weights mapped"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_of_single_examples_equal_a_loop(name: str, all_mapped: bool) -> None:
    together, alone = per_example(name, MANY, all_mapped)
    for batched, single in zip(together(), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single))


@pytest.mark.parametrize("name", PRODUCTS)
def test_examples_are_not_called_one_by_one(name: str) -> None:
    def calls(examples: int) -> int:
        together, _ = per_example(name, examples, False)
        with Calls() as counted:
            together()
        return counted.count

    assert calls(MANY + 6) == calls(MANY)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if name in PRESENCE])
def test_examples_may_have_modalities_of_their_own(name: str) -> None:
    inputs = {k: v for k, v in sized(name, SMALL).items() if k != "presence"}
    leaves = [x.double() for v in inputs.values() if isinstance(v, (list, Tensor)) for x in flat(v)]
    presence = torch.rand(MANY, 2, 2, generator=torch.Generator().manual_seed(3)) < 0.6

    def loss(present: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        given = {
            k: [next(left) for _ in v] if isinstance(v, list) else next(left) if isinstance(v, Tensor) else v
            for k, v in inputs.items()
        }
        return getattr(mmk, name)(**given, presence=present).sin().sum()

    gradients = torch.func.grad(loss, argnums=tuple(range(1, 1 + len(leaves))))
    together = torch.vmap(gradients, in_dims=(0, *[None] * len(leaves)))(presence, *leaves)
    alone = [gradients(present, *leaves) for present in presence]
    for batched, single in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single))
