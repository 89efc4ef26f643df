"""What torch asks of every op, as checks on a function of tensors alone and leaves to call it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from agreement import agree
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels.testing import poisoned_memory, same_bits

Function = Callable[..., Tensor]
Results = Callable[[], Sequence[Tensor]]


def fixed_gradient(out: Tensor) -> Tensor:
    """A random gradient of an output, the same for every output of its shape."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.dtype)


def gradients(function: Function, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients of all leaves, for one fixed random gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, fixed_gradient(out))]


def check_each_gradient_alone(function: Function, leaves: Sequence[Tensor]) -> None:
    """Every gradient is the same, bit for bit, when it is the only one that is needed."""
    _, *together = gradients(function, leaves)
    for i, expected in enumerate(together):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        out = function(*alone)
        assert agree(torch.autograd.grad(out, [alone[i]], fixed_gradient(out)), [expected]), f"gradient of leaf {i}"


def check_threads_and_runs(run: Results) -> None:
    """The same bits from any number of threads and every time."""
    first = run()
    try:
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            assert same_bits(run(), first), f"{threads} threads"
    finally:
        torch.set_num_threads(1)


def check_fresh_memory(run: Results) -> None:
    """Every element is written: the same where fresh memory is full of NaN."""
    expected = run()
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert agree(run(), expected)


def check_results_in_memory(run: Results) -> None:
    check_threads_and_runs(run)
    check_fresh_memory(run)


def check_threads_and_runs_agree(function: Function, leaves: Sequence[Tensor]) -> None:
    check_threads_and_runs(lambda: gradients(function, leaves))


def check_every_element_is_written(function: Function, leaves: Sequence[Tensor]) -> None:
    check_fresh_memory(lambda: gradients(function, leaves))


def check_strides(function: Function, leaves: Sequence[Tensor]) -> None:
    """Rows with gaps, a last dim that is not dense, a gradient that is expanded: the same bits as from dense memory."""
    expected = gradients(function, leaves)

    def with_gaps(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        wide[..., 1 : 1 + x.shape[-1]] = x
        return wide[..., 1 : 1 + x.shape[-1]]

    def strided(x: Tensor) -> Tensor:
        return x.unsqueeze(-1).expand(*x.shape, 2).contiguous()[..., 0]

    for arranged in (with_gaps, strided):
        assert agree(gradients(function, [arranged(x.detach()) for x in leaves]), expected), arranged.__name__
    leaves = [x.detach().requires_grad_() for x in leaves]
    dense = torch.autograd.grad(function(*leaves), leaves, torch.ones_like(expected[0]))
    assert agree(torch.autograd.grad(function(*leaves).sum(), leaves), dense), "expanded gradient"


def check_compile(function: Function, make: Callable[[int], list[Tensor]]) -> None:
    """No graph break, dynamic shapes, the bits of eager. ``make(batch)`` gives leaves."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        leaves = make(batch)
        assert agree(gradients(compiled, leaves), gradients(function, leaves))


def check_func(function: Function, leaves: Sequence[Tensor]) -> None:
    """torch.func.grad is autograd's; vmap of it is a loop."""
    leaves = [x.detach() for x in leaves]
    every = tuple(range(len(leaves)))

    def loss(*x: Tensor) -> Tensor:
        return function(*x).sin().sum()

    got = torch.func.grad(loss, argnums=every)(*leaves)
    asked = [x.clone().requires_grad_() for x in leaves]
    assert agree(got, torch.autograd.grad(loss(*asked), asked))
    mapped = [torch.stack([x, 2 * x]) if i == 0 else x for i, x in enumerate(leaves)]
    dims = tuple(0 if i == 0 else None for i in every)
    batched = torch.vmap(torch.func.grad(loss, argnums=every), in_dims=dims)(*mapped)
    for i in range(2):
        one = torch.func.grad(loss, argnums=every)(mapped[0][i], *leaves[1:])
        for a, b in zip(batched, one, strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-5, atol=1e-6)


def check_second_order(function: Function, leaves: Sequence[Tensor]) -> None:
    """Gradients and second gradients in float64, by finite differences."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(function, wide)
    assert torch.autograd.gradgradcheck(function, wide, fast_mode=True)


def check_checkpoint(function: Function, leaves: Sequence[Tensor]) -> None:
    def run(called: Function) -> list[Tensor]:
        asked = [x.detach().requires_grad_() for x in leaves]
        called(*asked).square().sum().backward()
        return [x.grad for x in asked if x.grad is not None]

    expected = run(function)
    assert len(expected) == len(leaves)
    assert agree(run(lambda *x: checkpoint(function, *x, use_reentrant=False)), expected)
    # Its forward is one without gradients, and few queries are then attended from by a kernel of another order.
    torch.testing.assert_close(run(lambda *x: checkpoint(function, *x, use_reentrant=True)), expected)


def check_export(function: Function, make: Callable[[int], list[Tensor]], batched: int) -> None:
    """A program exported for any batch; the first ``batched`` leaves have it as their first dim."""

    class Model(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return function(*x)

    leaves = [x.detach() for x in make(3)]
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} if i < batched else None for i in range(len(leaves))),)
    exported = torch.export.export(Model(), tuple(leaves), dynamic_shapes=shapes).module()
    other = [x.detach() for x in make(5)]
    assert torch.equal(exported(*other), function(*other))
