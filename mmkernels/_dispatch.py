"""Registration of ops with torch, and the choice of a backend per call.

An `Operator` is one op under ``torch.ops.mmkernels`` with a table of backends, best first. The backward of an op is an
operator of its own. A backend says with ``supports(*args)`` why it cannot serve a call; the first that can runs it, and
the last one, the reference, can serve every call.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from mmkernels import _autograd, _native
from mmkernels._errors import UnsupportedError

BACKENDS = ("cuda", "triton", "cpu", "simt", "reference")

_library = torch.library.Library("mmkernels", "FRAGMENT")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: ``supports`` and ``run`` take the arguments of the op's schema, in order."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    for_tests: bool = False  # served only where it is forced, and no explanation mentions it


def reference_backend(run: Callable[..., Any]) -> Backend:
    """The reference as a table's last entry. Autocast is off inside it: dtypes were settled at the door."""

    def run_without_autocast(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return run(*args)
        with torch._C._DisableAutocast():
            return run(*args)

    return Backend("reference", run_without_autocast, lambda *_: None)


def native_op(name: str) -> tuple[Callable[..., Any], str | None]:
    """A private op of the compiled library; where it is absent, something that raises when called, and why."""
    reason = None
    if not _native.available():
        reason = f"the native library is absent: {_native.reason()}"
    elif not hasattr(torch.ops.mmkernels, name):
        reason = f"the native library was built without {name}"
    if reason is None:
        return getattr(torch.ops.mmkernels, name).default, None

    def absent(*_: Any) -> Any:
        raise UnsupportedError(f"{name}: {reason}")

    return absent, reason


def native_door(name: str) -> Callable[..., Any]:
    """The compiled library's short way into an op: the result of a plain eager call, or None where a call is not plain.

    It skips the checks and the dispatch that cost more than a small kernel; ask `may_use_door` first.
    """
    door = _native.door(name)
    return door if door is not None else lambda *_: None


def may_use_door() -> bool:
    """Whether calls are neither traced nor forced to a backend, and carry no tangents of forward-mode AD."""
    return not torch.compiler.is_compiling() and forward_ad._current_level < 0 and not _forced.get(_forced_default)


# --- forcing and explaining -------------------------------------------------------------------------------------------


class _Explained(Exception):
    """Carries the explanation out of a call that is asked to stop where it would start to compute."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_EXPLAIN = "\0explain"


def _checked_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(reversed(BACKENDS))}; got {name!r}")
    return name


def _forced_by_environment() -> tuple[str, ...]:
    name = os.environ.get("MMKERNELS_BACKEND", "")
    return (_checked_name(name, "MMKERNELS_BACKEND"),) if name else ()


# The forced backends, innermost last. A context variable is private to each thread and to each asyncio task.
_forced: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("mmkernels_backend")
_forced_default = _forced_by_environment()
_FORCED_AROUND_BACKWARD = "mmkernels_backend"


class _AroundBackward(threading.local):
    """The names again, where the threads that torch runs a GPU's backward in find those of the thread that called it.

    Torch hands them what a thread keeps under a key. Up to 2.11 it takes the reference that it is given for its own, so
    it gets one, once for each thread.
    """

    def __init__(self) -> None:
        self.names: list[tuple[str, ...]] = [()]
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.names))
        torch._C._stash_obj_in_tls(_FORCED_AROUND_BACKWARD, self.names)


_around_backward = _AroundBackward()


def _forced_names() -> tuple[str, ...]:
    """The forced backends; in a thread of a backward those around the call of it."""
    names = _forced.get(_forced_default)
    if not names and torch._C._current_graph_task_id() != -1 and torch._C._is_key_in_tls(_FORCED_AROUND_BACKWARD):
        return torch._C._get_obj_in_tls(_FORCED_AROUND_BACKWARD)[0]
    return names


class use_backend(contextlib.ContextDecorator):
    """Force one backend inside a ``with`` block, in this thread: ``with mmk.use_backend("reference"): ...``.

    Blocks nest, and one object may be entered repeatedly. A call that the backend cannot serve raises
    `mmkernels.UnsupportedError`. Compiled code obeys the block in which it runs, not the one in which it was compiled.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked_name(name, "use_backend")

    def __enter__(self) -> use_backend:
        self._force((*_forced.get(_forced_default), self.name))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._force(_forced.get()[:-1])

    @staticmethod
    def _force(names: tuple[str, ...]) -> None:
        _forced.set(names)
        _around_backward.names[0] = names


@dataclass(frozen=True)
class Served:
    """A call that one backend was preferred for: which one served it, and why not that one."""

    op: str
    backend: str
    reason: str | None  # None where the preferred one did


class Preference(str):
    """The name of a backend, to be forced as such, that others may stand in for. ``calls`` says where they did."""

    def __init__(self, name: str) -> None:
        self.calls: list[Served] = []


def forced_backend() -> str | None:
    """The backend that this thread's calls are forced to, or None."""
    names = _forced.get(_forced_default)
    return names[-1] if names else None


def is_forced(name: str) -> bool:
    """Whether this thread's calls are forced to a backend, also while they are explained."""
    return name in _forced.get(_forced_default)


@dataclass(frozen=True)
class Explanation:
    """Which backend would serve a call, and why each better one would not."""

    op: str
    backend: str
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reasons", MappingProxyType(dict(self.reasons)))

    def __reduce__(self) -> tuple[type[Explanation], tuple[str, str, dict[str, str]]]:
        return Explanation, (self.op, self.backend, dict(self.reasons))  # a MappingProxyType does not pickle

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend}"]
        return "\n".join(lines + [f"  not on {name}: {reason}" for name, reason in self.reasons.items()])

    __repr__ = __str__


def explain(op: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``op(*args, **kwargs)``, and why the better ones would not. Computes nothing.

    ``op`` is a public function of the package or its name, or a module of `mmkernels.nn`. Raises what the call itself
    would raise for bad input or for a forced backend that cannot serve it.
    """
    if isinstance(op, str):
        import mmkernels

        function = getattr(mmkernels, op, None)
        if not callable(function):
            raise ValueError(f"explain: op: expected the name of a public function of mmkernels; got {op!r}")
    else:
        function = op
    names = _forced.get(_forced_default)
    token = _forced.set((*names, _EXPLAIN))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            function(*args, **kwargs)
    except _Explained as stop:
        return stop.explanation
    finally:
        _forced.reset(token)
    raise ValueError(f"explain: op: expected an op of mmkernels; {op!r} calls none")


def backend_status() -> dict[str, str | None]:
    """For each backend, None where this machine can use it, or why it cannot."""
    from mmkernels import _cuda, _triton

    return {
        "cuda": _cuda.status(),
        "triton": _triton.status(),
        "cpu": None if _native.available() else _native.reason() or "the native library is absent",
        "simt": _cuda.simt_status(),
        "reference": None,
    }


# --- operators --------------------------------------------------------------------------------------------------------

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call on these tensors. True when a functorch transform might ask for it."""
    if not torch.is_grad_enabled():
        return False
    for t in tensors:
        if t is not None and t.requires_grad:
            return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_TANGENTS = "tangents of forward-mode AD are carried by plain torch alone"


def _carry_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD may have given one of the tensors a tangent. Under a functorch transform it may be hidden
    in any layer of them."""
    if forward_ad._current_level < 0:
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _alive(x: Any) -> Any:
    """A tensor without the wrapper of a functorch level that has ended, as a backward may find them saved."""
    return torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x


class Operator:
    """One op ``torch.ops.mmkernels.<name>`` and its backends, best first.

    ``fake`` gives the outputs' shapes, dtypes and strides. Calling the operator with plain tensors skips torch's
    dispatcher, whose Python round trips cost more than a small kernel; under any tracing or mode it goes through it.
    ``differentiable`` is the op in plain torch that autograd can take apart: it serves calls on tensors with tangents.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        backends: Sequence[Backend],
        differentiable: Callable[..., Any],
    ) -> None:
        self.name = name
        self._differentiable = differentiable
        self.backends = tuple(backends)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _library.impl(name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mmkernels::{name}", fake, lib=_library)
        self.overload = getattr(torch.ops.mmkernels, name).default
        self._apply: Callable[..., Any] | None = None
        self._transformed: Callable[..., Any] | None = None
        declared = self.overload._schema
        types = [str(a.type) for a in declared.arguments]
        self._tensor_positions = tuple(i for i, t in enumerate(types) if "Tensor" in t)
        self.has_lists = any("List[Tensor]" in t for t in (*types, *(str(r.type) for r in declared.returns)))

    def __call__(self, *args: Any) -> Any:
        """Run the op on the arguments of its schema, all positional."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if forward_ad._current_level >= 0 and _carry_tangents(self._tensors(args)):
            return self._with_tangents(args)
        if torch._C._are_functorch_transforms_active():
            return self.overload(*args) if self._transformed is None else self._transformed(*args)
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return self.overload(*args)
        grad = False
        for i in self._tensor_positions:
            for tensor in args[i] if type(args[i]) is list else (args[i],):
                if type(tensor) not in _PLAIN_TYPES:
                    return self.overload(*args)
                if tensor is not None and tensor.requires_grad:
                    grad = True
        if grad and self._apply is not None and torch.is_grad_enabled():
            return self._apply(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """Run on the best backend that serves the call, below autograd."""
        if names := _forced_names():
            return self._choose_forced(names, args).run(*args)
        for backend in self.backends:
            if backend.supports(*args) is None:
                return backend.run(*args)
        raise UnsupportedError(f"{self.name}: no backend serves this call")

    def _tensors(self, args: tuple[Any, ...]) -> Iterator[Tensor | None]:
        for i in self._tensor_positions:
            yield from args[i] if isinstance(args[i], (list, tuple)) else (args[i],)

    def _with_tangents(self, args: tuple[Any, ...]) -> Any:
        names = _forced_names()
        if names and names[-1] == _EXPLAIN:
            self.explain_reference(_TANGENTS)
        if names and names[-1] != "reference":
            if not isinstance(names[-1], Preference):
                raise self._refusal(names[-1], _TANGENTS)
            names[-1].calls.append(Served(self.name, "reference", _TANGENTS))
        args = tuple([_alive(t) for t in x] if isinstance(x, (list, tuple)) else _alive(x) for x in args)
        if not torch._C._is_any_autocast_enabled():
            return self._differentiable(*args)
        with torch._C._DisableAutocast():
            return self._differentiable(*args)

    def explain_reference(self, reason: str) -> None:
        """Where the call is being explained: that plain torch serves it, and for this reason no other backend."""
        names = _forced.get(_forced_default)
        if not names or names[-1] != _EXPLAIN:
            return
        if len(names) > 1 and names[-2] != "reference":
            raise self._refusal(names[-2], reason)
        others = [b.name for b in self.backends if b.name != "reference" and not b.for_tests]
        raise _Explained(Explanation(self.name, "reference", {} if len(names) > 1 else dict.fromkeys(others, reason)))

    def leaves_to_torch(self, reason: str) -> bool:
        """Whether plain torch shall serve a call that it serves faster, for this reason: unless a backend is forced."""
        if any(name != _EXPLAIN for name in _forced.get(_forced_default)):
            return False
        self.explain_reference(reason)
        return True

    def _refusal(self, forced: str, reason: str) -> UnsupportedError:
        return UnsupportedError(f"{self.name}: backend {forced!r} was forced and cannot serve this call: {reason}")

    def _choose_forced(self, names: tuple[str, ...], args: tuple[Any, ...]) -> Backend:
        if names[-1] == _EXPLAIN:
            raise _Explained(self._explain(names[-2] if len(names) > 1 else None, args))
        return self._forced_backend(names[-1], args)

    def _forced_backend(self, name: str, args: tuple[Any, ...]) -> Backend:
        forced = next((backend for backend in self.backends if backend.name == name), None)
        reason = f"this op has no {name} kernels" if forced is None else forced.supports(*args)
        if isinstance(name, Preference):
            backend = forced if reason is None else next(b for b in self.backends if b.supports(*args) is None)
            assert backend is not None
            name.calls.append(Served(self.name, backend.name, reason))
            return backend
        if forced is None:
            raise UnsupportedError(f"{self.name}: backend {name!r} was forced and this op has none")
        if reason is not None:
            raise self._refusal(name, reason)
        return forced

    def _explain(self, forced: str | None, args: tuple[Any, ...]) -> Explanation:
        if forced is not None:
            return Explanation(self.name, self._forced_backend(forced, args).name)
        reasons: dict[str, str] = {}
        for backend in self.backends:
            reason = backend.supports(*args)
            if reason is None:
                return Explanation(self.name, backend.name, reasons)
            if not backend.for_tests:
                reasons[backend.name] = reason
        raise UnsupportedError(f"{self.name}: no backend serves this call: {reasons}")

    def impl(self, key: str, function: Callable[..., Any]) -> None:
        """Serve one of torch's dispatch keys with ``function``, which takes the arguments of the schema."""
        _library.impl(self.name, function, key)

    def register_gradient(
        self,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        backward: Callable[..., Any],
        vmap: Callable[..., tuple[Any, Any]],
    ) -> None:
        """Attach a gradient and a batching rule.

        ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grads)`` are those of
        ``torch.library.register_autograd``; ``vmap(info, in_dims, *args) -> (outputs, out_dims)`` that of
        ``torch.library.register_vmap``. Both call operators, never ``overload``. Lists of tensors come as lists, and so
        do their gradients and ``ctx.needs_input_grad``.
        """
        name = f"mmkernels::{self.name}"
        _library.impl(self.name, self._autograd_kernel(setup_context, backward), "Autograd", with_keyset=True)
        torch.library.register_vmap(name, vmap, lib=_library)
        functions = _autograd.autograd_functions_of_lists if self.has_lists else _autograd.autograd_functions
        eager, transformed = functions(self, setup_context, backward, vmap)
        # Without the wrapper that looks for transforms.
        apply = super(torch.autograd.Function, eager).apply  # type: ignore[misc]
        self._apply = _autograd.flattening(apply) if self.has_lists else apply
        self._transformed = _autograd.flattening(transformed.apply) if self.has_lists else transformed.apply

    def _autograd_kernel(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
        """As ``torch.library.register_autograd`` makes it, but for tensors with tangents, which it would drop."""
        info = Info(_backward_fn=backward, _setup_context_fn=_autograd.by_keyword(setup_context))
        without_tangents = make_autograd_impl(self.overload, info)

        def kernel(keyset: Any, *args: Any) -> Any:
            if forward_ad._current_level >= 0 and _carry_tangents(self._tensors(args)):
                return self._with_tangents(args)
            return without_tangents(keyset, *args)

        return kernel
