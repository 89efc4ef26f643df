"""What the tests of the row ops share: memory layouts, and everything that torch may do to a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from agreement import agree
from environment import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels.testing import same_bits

DTYPES = [pytest.param(t, id=str(t)[6:]) for t in (torch.float32, torch.bfloat16, torch.float16)]


def strided(tensor: Tensor) -> Tensor:
    """The same values as a leaf: leading dims in the other order, with gaps, the last from an odd offset."""
    dims = tensor.dim()
    order = [*reversed(range(dims - 1)), dims - 1]
    source = tensor.detach().permute(order)
    wide = torch.full((*source.shape[:-1], source.shape[-1] + 3), torch.nan).to(tensor.dtype)
    wide[..., 1:-2] = source
    return wide[..., 1:-2].permute([order.index(d) for d in range(dims)]).requires_grad_(tensor.requires_grad)


@dataclass
class RowOp:
    """A call: the function, positional arguments, options. Tensors may stand in lists."""

    function: Callable[..., Tensor]
    inputs: Sequence[Any]
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        found: list[Tensor] = []
        for x in (*self.inputs, *self.options.values()):
            found += [t for t in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(t, Tensor)]
        return [t for t in found if t.requires_grad]

    def with_leaves(self, leaves: Sequence[Tensor]) -> Tensor:
        """The output with other tensors in the places of the leaves."""
        rest = iter(leaves)

        def replaced(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [replaced(e) for e in x]
            return next(rest) if isinstance(x, Tensor) and x.requires_grad else x

        inputs = [replaced(x) for x in self.inputs]
        return self.function(*inputs, **{name: replaced(x) for name, x in self.options.items()})

    def output(self) -> Tensor:
        return self.with_leaves(self.leaves())

    def loss(self, *leaves: Tensor) -> Tensor:
        return self.with_leaves(leaves).float().sin().sum()

    def outputs_and_gradients(self) -> list[Tensor]:
        leaves = self.leaves()
        return [self.output(), *torch.autograd.grad(self.loss(*leaves), leaves)]


def check_in_torch(op: RowOp, backend: str) -> None:
    """Compile, functional transforms, autocast, checkpoint, determinism, gradients that are not needed."""
    leaves = op.leaves()
    want = op.outputs_and_gradients()
    gradients = want[1:]

    if backend != "reference":  # torch's own sums differ
        torch.set_num_threads(2)
        assert same_bits(op.outputs_and_gradients(), want), "two threads give other bits"
        torch.set_num_threads(1)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: op.loss(*x), fullgraph=True, dynamic=True, backend="aot_eager")
    assert agree(torch.autograd.grad(compiled(*leaves), leaves), gradients), "compiled gradients differ"

    detached = [x.detach() for x in leaves]
    everything = tuple(range(len(leaves)))
    assert agree(torch.func.grad(op.loss, argnums=everything)(*detached), gradients), "torch.func.grad differs"
    batched = [torch.stack([x, x * 0.5]) for x in detached]
    mapped = torch.vmap(lambda *x: op.with_leaves(x))(*batched)
    for i in range(2):
        assert torch.equal(mapped[i], op.with_leaves([x[i] for x in batched])), "vmap differs from a loop"

    recomputed = checkpoint(op.loss, *leaves, use_reentrant=False)
    assert agree(torch.autograd.grad(recomputed, leaves), gradients), "checkpoint differs"

    for i in range(len(leaves)):
        one = [x.detach().requires_grad_(j == i) for j, x in enumerate(leaves)]
        (grad,) = torch.autograd.grad(op.loss(*one), one[i])
        assert agree([grad], gradients[i : i + 1]), f"the gradient of leaf {i} alone differs"

    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = op.with_leaves([leaves[0].bfloat16(), *leaves[1:]])
    assert mixed.dtype == (torch.bfloat16 if len(leaves) == 1 else torch.float32)


def check_second_order(op: RowOp) -> None:
    """Gradients of gradients in float64, against finite differences."""
    leaves = [x.detach().double().requires_grad_() for x in op.leaves()]
    torch.autograd.gradcheck(lambda *x: op.with_leaves(x), leaves)
    torch.autograd.gradgradcheck(lambda *x: op.with_leaves(x), leaves)
