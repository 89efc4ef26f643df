"""Comparison with a float64 oracle: what the tests of the package use, for your own ops and models too.

The rule: the error of a result against the same computation in float64 is at most twice that of plain PyTorch in the
result's own dtype, in norm and in the largest element, beside a floor of a few roundings.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from mmkernels._dispatch import use_backend
from mmkernels.triton.interpreter import fix_triton_interpreter

__all__ = ["assert_close_to_oracle", "check_op", "fix_triton_interpreter", "poisoned_memory", "same_bits"]

_deterministic: Any = torch.utils.deterministic  # a module whose setting is a property
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


def check_op(
    function: Callable[..., Any],
    *inputs: Any,
    backend: str | None = None,
    grad: bool = True,
    seed: int = 0,
    factor: float = 2.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run a public op on a backend and hold its outputs and all gradients to the precision rule.

    The plain result is the op's reference on the same tensors, the oracle its reference in float64. Tensors among
    ``inputs`` and ``options`` that require grad are differentiated, by random gradients of every output.

    Args:
        function: a public function of the package.
        inputs: its positional arguments.
        backend: the backend to force; None = the one that the call would choose.
        grad: also compare gradients.
        seed: of torch's generator before each run, so that dropout draws alike, and of the outputs' gradients.
        factor: how much worse than plain PyTorch the results may be.
        options: its keyword arguments.

    Returns:
        The outputs of the backend under test.
    """

    tensors = _tensors((*inputs, *options.values()))
    dtype = next(x.dtype for x in tensors if x.is_floating_point())
    needs_grad = grad and any(x.requires_grad for x in tensors)

    def run(where: str | None, wide: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        def prepared(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [prepared(e) for e in x]
            if not isinstance(x, Tensor):
                return x
            if wide and x.is_floating_point():
                return x.detach().double().requires_grad_(needs_grad)
            return x.detach().requires_grad_(x.requires_grad)

        args = [prepared(x) for x in inputs]
        kwargs = {name: prepared(x) for name, x in options.items()}
        torch.manual_seed(seed)
        with use_backend(where) if where else contextlib.nullcontext():
            outputs = function(*args, **kwargs)
            outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
            named = {**{str(i): x for i, x in enumerate(args)}, **kwargs}
            for name in [n for n, x in named.items() if isinstance(x, list)]:
                named.update({f"{name}[{i}]": x for i, x in enumerate(named.pop(name))})
            leaves = {n: x for n, x in named.items() if isinstance(x, Tensor) and x.requires_grad}
            if not grad or not leaves:
                return outputs, {}
            generator = torch.Generator("cpu").manual_seed(seed)
            grads = [torch.randn(o.shape, generator=generator, device="cpu").to(dtype) for o in outputs]
            grads = [g.to(o.device, o.dtype) for g, o in zip(grads, outputs, strict=True)]
            pulled = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return outputs, dict(zip(leaves, pulled, strict=True))

    ours, our_grads = run(backend, wide=False)
    plain, plain_grads = run("reference", wide=False)
    exact, exact_grads = run("reference", wide=True)
    # In float32 a half-precision call may give an output as exact as products of its inputs, and a gradient as exact
    # as the output that its backward starts from.
    eps = torch.finfo(dtype).eps
    for i, (got, same_dtype, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_close_to_oracle(got, same_dtype, oracle, name=f"output {i}", factor=factor, rounding=eps / 64)
    # A gradient may be a sum that cancels (a softmax over one key has none): its terms are as large as the largest
    # gradient of any input, those that nobody asked for included, times what they are multiplied by.
    terms = max((_largest(g) for g in exact_grads.values()), default=0.0)
    terms *= max(1.0, *(_largest(x) for x in tensors if x.is_floating_point()))
    for name, got in our_grads.items():
        same_dtype, oracle = plain_grads[name], exact_grads[name]
        assert_close_to_oracle(
            got,
            same_dtype,
            oracle,
            name=f"gradient of input {name}",
            factor=factor,
            scale=terms,
            rounding=eps / 2,
        )
    return tuple(ours)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """All tensors among the values, those inside lists included."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, (list, tuple)):
            found += _tensors(x)
        elif isinstance(x, Tensor):
            found.append(x)
    return found


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach()[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN inside the block, C++ ones included: an element that nobody wrote shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        _deterministic.fill_uninitialized_memory = fill


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit, NaN included."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )
