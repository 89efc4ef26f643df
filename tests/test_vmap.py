"""vmap of ops with weights over many small examples: batched products, and not a call for each example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import CALLS, Call, in_one, leaves_of, mapped
from test_weight_strides import each_product
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MANY = 64
WITH_PRESENCE = [c for c in CALLS.values() if c.weights() and c.inputs().get("presence") is not None]
SMALL = dict(B=2, K=6, N=5, D=6, A=5)


class Calls(TorchDispatchMode):
    """Counts what torch is asked for below every transform."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def is_weight(call: Call, argument: str) -> bool:
    return argument in call.weights() or "bias" in argument or "norm" in argument


def per_example(call: Call, examples: int, all_mapped: bool) -> tuple[Callable[[], Any], list[tuple[Tensor, ...]]]:
    """vmap of the gradients of all leaves, and the same one by one; in float64, so that nothing but the batching is
    tested."""
    call = call.at(**SMALL)
    dims = [
        None if is_weight(call, argument) and not all_mapped else 0
        for argument, value in call.inputs().items()
        for _ in leaves_of({argument: value})
    ]
    torch.manual_seed(2)
    inputs = [
        x if dim is None else torch.randn(examples, *x.shape, dtype=x.dtype)
        for x, dim in zip(call.leaves(torch.float64), dims, strict=True)
    ]
    gradients = torch.func.grad(lambda *x: call(*x).sin().sum(), argnums=tuple(range(len(inputs))))
    pairs = list(zip(inputs, dims, strict=True))
    alone = [gradients(*(x if d is None else x[i] for x, d in pairs)) for i in range(examples)]
    return lambda: torch.vmap(gradients, in_dims=tuple(dims))(*inputs), alone


@pytest.mark.parametrize("all_mapped", [False, True], ids=["weights shared", "weights mapped"])
@each_product
def test_gradients_of_single_examples_equal_a_loop(call: Call, all_mapped: bool) -> None:
    together, alone = per_example(call, MANY, all_mapped)
    for batched, single in zip(together(), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single))


@each_product
def test_examples_are_not_called_one_by_one(call: Call) -> None:
    def calls(examples: int) -> int:
        together, _ = per_example(call, examples, False)
        with Calls() as counted:
            together()
        return counted.count

    assert calls(MANY + 6) == calls(MANY)


@pytest.mark.parametrize("call", WITH_PRESENCE, ids=str)
def test_examples_may_have_modalities_of_their_own(call: Call) -> None:
    call = call.at(**SMALL)
    leaves = call.leaves(torch.float64)
    inputs = call.inputs()
    presence = torch.rand(MANY, *inputs["presence"].shape, generator=torch.Generator().manual_seed(3)) < 0.6

    def loss(present: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return in_one(call.public(**mapped(inputs, lambda _: next(left)) | {"presence": present})).sin().sum()

    gradients = torch.func.grad(loss, argnums=tuple(range(1, 1 + len(leaves))))
    together = torch.vmap(gradients, in_dims=(0, *[None] * len(leaves)))(presence, *leaves)
    alone = [gradients(present, *leaves) for present in presence]
    for batched, single in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single))
