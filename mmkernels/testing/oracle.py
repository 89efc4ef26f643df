"""Comparison with a float64 oracle.

The rule: the error of a result against the same computation in float64 is at most twice that of plain PyTorch in the
result's own dtype, in norm and in the largest element, beside a floor of a few roundings.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmkernels._dispatch import use_backend

_FLOAT32_ROUNDINGS = 8  # errors of this many float32 roundings of the largest element always pass


def assert_close_to_oracle(
    got: Tensor,
    same_dtype: Tensor,
    oracle: Tensor,
    *,
    name: str = "output",
    factor: float = 2.0,
    scale: float | None = None,
    rounding: float = 0.0,
) -> None:
    """Assert that ``got`` is within ``factor`` times the error of ``same_dtype``, both measured against ``oracle``.

    Args:
        got: the result under test.
        same_dtype: plain PyTorch's result on the same inputs in the same dtype.
        oracle: the result on the same inputs in float64.
        name: what the tensor is, for the message.
        factor: how much worse than plain PyTorch the result may be.
        scale: magnitude of the terms that were summed, where they may cancel; default: oracle's largest element.
        rounding: relative to ``scale``, an error that always passes where ``got`` is wider than the call's inputs.

    Non-finite elements must be the same as the oracle's.

    Raises:
        AssertionError: the message names the tensor, both errors and the bound.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, expected {same_dtype.dtype}"
    if got.numel() == 0:
        return
    exact, ours, plain = oracle.detach().double(), got.detach().double(), same_dtype.detach().double()
    if not (exact.isfinite().all() and ours.isfinite().all()):
        finite = exact.isfinite()
        same_class = torch.where(finite, ours.isfinite(), (ours == exact) | (ours.isnan() & exact.isnan()))
        if not same_class.all():
            where = tuple(int(i) for i in (~same_class).nonzero()[0])
            count = int((~same_class).sum())
            raise AssertionError(
                f"{name}: {count} elements are non-finite where the oracle's are not, or differently; the first, at "
                f"{where}, is {ours[where].item()} and should be {exact[where].item()}"
            )
        exact, ours, plain = exact[finite], ours[finite], plain[finite]
        if exact.numel() == 0:
            return
    unit = torch.finfo(got.dtype).eps / 2
    unit = max(unit, _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps) if got.dtype != torch.float64 else 8 * unit
    floor = max(unit, rounding) * max(float(exact.abs().max()), scale or 0.0)
    plain_error = torch.where(plain.isfinite(), plain - exact, torch.zeros_like(exact))
    for measure, norm, floor_factor in (("norm", 2, math.sqrt(exact.numel())), ("largest element", torch.inf, 1.0)):
        error = float(torch.linalg.vector_norm(ours - exact, norm))
        plain_norm = float(torch.linalg.vector_norm(plain_error, norm))
        bound = factor * plain_norm + floor * floor_factor
        assert error <= bound, (
            f"{name}: error {error:.3e} in {measure}, allowed {bound:.3e} ({factor:g} × {plain_norm:.3e}, the error of "
            f"plain PyTorch in {got.dtype}, + {floor * floor_factor:.1e}); oracle's is "
            f"{float(torch.linalg.vector_norm(exact, norm)):.3e}"
        )


@dataclass(frozen=True)
class Outcome:
    """The outputs of one run, and the gradients of its leaves by their names."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A function or a module with its arguments, to be run again and again on copies of them."""

    function: Callable[..., Any]
    inputs: Sequence[Any]
    options: dict[str, Any]
    grad: bool = True
    seed: int = 0

    def tensors(self) -> list[Tensor]:
        """The floating tensors that it depends on, a module's parameters included."""
        given = pytree.tree_leaves((self.inputs, self.options))
        weights = list(self.function.parameters()) if isinstance(self.function, nn.Module) else []
        return [x for x in (*given, *weights) if isinstance(x, Tensor) and x.is_floating_point()]

    def dtype(self) -> torch.dtype:
        """Of the first floating tensor, the one that outputs' gradients are rounded to."""
        return next(x.dtype for x in self.tensors())

    def run(
        self,
        around: contextlib.AbstractContextManager[Any],
        *,
        wide: bool = False,
        function: Callable[..., Any] | None = None,
    ) -> Outcome:
        """Run it inside of ``around``, backward included; ``wide``: in float64, with the gradient of every floating
        input; ``function`` in its place."""
        differentiated = self.grad and any(x.requires_grad for x in self.tensors())

        def prepared(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if wide and x.is_floating_point():
                return x.detach().double().requires_grad_(differentiated)
            return x.detach().requires_grad_(x.requires_grad)

        args, kwargs = pytree.tree_map(prepared, (list(self.inputs), self.options))
        called = self.function if function is None else function
        leaves = dict(_named({**{str(i): x for i, x in enumerate(args)}, **kwargs}))
        if isinstance(called, nn.Module):
            called = copy.deepcopy(called)
            called = called.double() if wide else called
            leaves |= dict(called.named_parameters())
        leaves = {name: x for name, x in leaves.items() if x.requires_grad}
        torch.manual_seed(self.seed)
        with around:
            outputs = [x for x in pytree.tree_leaves(called(*args, **kwargs)) if isinstance(x, Tensor)]
            sources = [x for x in outputs if x.requires_grad]
            if not self.grad or not leaves or not sources:
                return Outcome(outputs, {})
            generator = torch.Generator("cpu").manual_seed(self.seed)
            grads = [torch.randn(x.shape, generator=generator, device="cpu").to(self.dtype()) for x in outputs]
            grads = [g.to(x.device, x.dtype) for g, x in zip(grads, outputs, strict=True) if x.requires_grad]
            pulled = torch.autograd.grad(sources, list(leaves.values()), grads, materialize_grads=True)
        return Outcome(outputs, dict(zip(leaves, pulled, strict=True)))

    def compare(self, ours: Outcome, plain: Outcome, exact: Outcome, factor: float, terms: float = 0.0) -> None:
        """Assert that one outcome obeys the precision rule, by plain PyTorch's in the same dtype and in float64."""
        # In float32 a half-precision call may give an output as exact as products of its inputs, and a gradient as
        # exact as the output that its backward starts from.
        eps = torch.finfo(self.dtype()).eps
        for i, (got, same_dtype, oracle) in enumerate(zip(ours.outputs, plain.outputs, exact.outputs, strict=True)):
            if not got.is_floating_point():
                assert torch.equal(got, same_dtype), f"output {i}: integers differ from plain PyTorch's"
                continue
            assert_close_to_oracle(
                got, same_dtype, oracle, name=f"output {i}", factor=factor, scale=terms, rounding=eps / 64
            )
        # A gradient may be a sum that cancels (a softmax over one key has none): its terms are as large as the largest
        # gradient of any input, those that nobody asked for included, times what they are multiplied by.
        of_gradients = max((_largest(g) for g in exact.gradients.values()), default=0.0)
        of_gradients *= max(1.0, *(_largest(x) for x in self.tensors()))
        for name, got in ours.gradients.items():
            assert_close_to_oracle(
                got,
                plain.gradients[name],
                exact.gradients[name],
                name=f"gradient of input {name}",
                factor=factor,
                scale=max(of_gradients, terms),
                rounding=eps / 2,
            )


def assert_matches_reference(
    function: Callable[..., Any],
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    backend: str | None = None,
    grad: bool = True,
    seed: int = 0,
    factor: float = 2.0,
    terms: float = 0.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run a function or a module on a backend and hold its outputs and all gradients to the precision rule.

    The plain result is that of ``reference`` on the same tensors, the oracle that of ``reference`` in float64. Tensors
    among ``inputs`` and ``options`` that require grad are differentiated, by random gradients of every output, and so
    are the parameters of a module, which is copied for each run.

    Args:
        function: a public function of the package, or any other function or module of tensors.
        inputs: its positional arguments, tensors in lists, tuples and dicts included.
        reference: the same in plain PyTorch; default: ``function`` with all of the package's ops in it on their
            references.
        backend: the backend to force; None = the one that each call would choose.
        grad: also compare gradients.
        seed: of torch's generator before each run, so that dropout draws alike, and of the outputs' gradients.
        factor: how much worse than plain PyTorch the results may be.
        terms: how large the terms are of which an output is the sum, or a gradient where no other gradient shows it:
            they may cancel, and their rounding remains.
        options: its keyword arguments.

    Returns:
        The outputs of the backend under test.

    Raises:
        AssertionError: the message names the tensor, both errors and the bound.
    """
    call = Call(function, inputs, options, grad, seed)
    ours = call.run(use_backend(backend) if backend else contextlib.nullcontext())
    plain = call.run(use_backend("reference"), function=reference)
    exact = call.run(use_backend("reference"), wide=True, function=reference)
    call.compare(ours, plain, exact, factor, terms)
    return tuple(ours.outputs)


check_op = assert_matches_reference


def _named(values: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors among the values, by where they are."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from _named({f"{name}[{i}]": x for i, x in enumerate(value)})
        elif isinstance(value, dict):
            yield from _named({f"{name}[{key!r}]": x for key, x in value.items()})


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
