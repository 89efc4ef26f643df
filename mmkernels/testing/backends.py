"""A model on every backend of this machine: whether it is right on each, and which ops that one does not serve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mmkernels import _native
from mmkernels._dispatch import Preference, Served, backend_status, use_backend
from mmkernels.testing.oracle import Call


@dataclass(frozen=True)
class Implementation:
    """A backend, and for the compiled library the instruction set in use."""

    backend: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.backend if self.isa is None else f"{self.backend} {self.isa}"

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """A block whose calls are served by it or raise `mmkernels.UnsupportedError`."""
        with self._in_use(), use_backend(self.backend):
            yield

    @contextlib.contextmanager
    def preferred(self) -> Iterator[list[Served]]:
        """A block whose calls are served by it where it can; yields the list of how each one was."""
        preference = Preference(self.backend)
        with self._in_use(), use_backend(preference):
            yield preference.calls

    def _in_use(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.isa is None else _native.use_isa(self.isa)


@dataclass(frozen=True)
class BackendReport:
    """How one implementation served a model's calls, backward ones included (``<op>_backward``)."""

    implementation: Implementation
    calls: tuple[Served, ...]

    @property
    def served(self) -> frozenset[str]:
        """The ops that the implementation itself served, in one call at least."""
        return frozenset(call.op for call in self.calls if call.reason is None)

    @property
    def fell_back(self) -> dict[str, str]:
        """The ops that another backend served in one call at least: which, and why."""
        return {call.op: f"on {call.backend}: {call.reason}" for call in self.calls if call.reason is not None}

    def __str__(self) -> str:
        served = ", ".join(sorted(self.served)) or "nothing"
        others = "".join(f"\n  {op} {why}" for op, why in sorted(self.fell_back.items()))
        return f"{self.implementation}: {served}{others}"


def implementations(device: str = "cpu") -> list[Implementation]:
    """All that can run here on tensors of a device: the reference, the compiled library on each instruction set of this
    CPU, Triton's kernels (on the CPU with ``TRITON_INTERPRET=1``), CUDA kernels."""
    there = [name for name, reason in backend_status().items() if reason is None]
    kernels = [name for name in ("triton", "cuda") if name in there and (device == "cuda" or name == "triton")]
    isas = [Implementation("cpu", isa) for isa in _native.supported_isas()] if device == "cpu" else []
    return [Implementation("reference"), *isas, *map(Implementation, kernels)]


def check_backends(
    model: Callable[..., Any],
    *inputs: Any,
    on: Sequence[Implementation] | None = None,
    grad: bool = True,
    seed: int = 0,
    factor: float = 2.0,
    **options: Any,
) -> dict[str, BackendReport]:
    """Run a model on every backend and hold its outputs and all gradients to the precision rule of
    `assert_matches_reference`.

    A backend that does not serve one of the model's calls leaves it to the next best one, and the report says so.

    Args:
        model: a module, or a function of tensors, that calls ops of this package.
        inputs: its positional arguments.
        on: the implementations; default: all that can run here on the inputs' device.
        grad: also compare gradients: of the inputs that require one and of the model's parameters.
        seed: of torch's generator before each run, and of the outputs' gradients.
        factor: how much worse than plain PyTorch the results may be.
        options: its keyword arguments.

    Returns:
        A report for each implementation, by its name: "reference", "cpu avx2", "triton".

    Raises:
        AssertionError: the message names the implementation, the tensor, both errors and the bound.
        ValueError: the model calls no op of this package.
    """
    call = Call(model, inputs, options, grad, seed)
    plain = call.run(use_backend("reference"))
    exact = call.run(use_backend("reference"), wide=True)
    device = call.tensors()[0].device.type
    reports = {}
    for implementation in implementations(device) if on is None else on:
        with implementation.preferred() as served:
            outcome = call.run(contextlib.nullcontext())
        if not served:
            raise ValueError("check_backends: model: expected one that calls ops of mmkernels; this one called none")
        try:
            call.compare(outcome, plain, exact, factor)
        except AssertionError as error:
            raise AssertionError(f"on {implementation}: {error}") from None
        reports[str(implementation)] = BackendReport(implementation, tuple(served))
    return reports
