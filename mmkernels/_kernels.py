"""What an op's ``op.py`` says of its kernels, and the backends that follow: compiled, CUDA and Triton.

Each has a forward and a backward, with the schemas of a `mmkernels._differentiable.DifferentiableOp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmkernels import _cuda, _triton
from mmkernels._dispatch import Backend, native_op

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class NativeKernels:
    """The private ops ``_<op>_fwd`` and ``_<op>_bwd`` of the compiled library, and what they cannot serve.

    Or, ``composed``, a forward and a backward in Python around torch's products and the private op ``_<name>``, which
    take what Triton's take.
    """

    supports: Callable[..., str | None] | None = None
    any_strides: bool = False  # whether they take floating tensors as they come
    # Names of the arguments that products read as they lie; the gradient of one with dense columns has dense columns.
    weights: tuple[str, ...] = ()
    composed: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    name: str = ""  # default: the op's


@dataclass(frozen=True)
class TritonKernels:
    """That the op's ``kernel_triton.py`` has ``forward`` and ``backward``, and what they cannot serve.

    They take the arguments of the two operators' schemas, those of the op as one tuple; ``supports`` that alone,
    ``supports_backward`` the flags of the needed gradients before it. An op in the folder of another names that, and
    what its own two functions begin with.
    """

    supports: Callable[..., str | None] | None = None
    supports_backward: Callable[..., str | None] | None = None  # default: as ``supports``
    any_strides: bool = False
    op: str | None = None
    prefix: str = ""


@dataclass(frozen=True)
class CudaKernels:
    """That the op's ``kernel_cuda.py`` has ``forward`` and ``backward``, what they cannot serve, and what others serve
    faster.

    They take the library and the arguments of the two operators' schemas, those of the op as one tuple; the rest that
    alone.
    """

    supports: Callable[..., str | None] | None = None
    supports_backward: Callable[..., str | None] | None = None  # default: as ``supports``
    loses: Callable[..., str | None] | None = None


def cpu_backend(kernels: NativeKernels, direction: str, arguments: Any, first: int, last: int) -> Backend:
    """The compiled forward or backward; the operator takes arguments of its own as in `triton_backends`."""
    weights = {first + arguments._fields.index(name) for name in kernels.weights}
    native, absent = native_op(f"_{kernels.name}" if kernels.composed else f"_{kernels.name}_{direction}")
    if kernels.composed:
        composed = kernels.composed[first]
        native = lambda *args: composed(*_gathered(arguments, first, last, args))  # noqa: E731

    def supports(*args: Any) -> str | None:
        if absent is not None:
            return absent
        tensor = args[first][0] if isinstance(args[first], (list, tuple)) else args[first]
        if not tensor.is_cpu:
            return _triton.inputs_are_on(tensor.device)
        if tensor.dtype not in _CPU_DTYPES:
            return f"{tensor.dtype} is served by the reference alone"
        if kernels.supports is None:
            return None
        return kernels.supports(arguments(*args[first:-last]))

    def run(*args: Any) -> Any:
        if kernels.any_strides:
            result = native(*args)
        else:
            result = native(*(x if i in weights else _triton.dense(x) for i, x in enumerate(args)))
        return list(result) if first else result

    return Backend("cpu", run, supports)


def cuda_backends(
    name: str, kernels: CudaKernels | None, function: str, arguments: Any, first: int, last: int
) -> list[Backend]:
    """As `triton_backends`, of the CUDA kernels."""
    if kernels is None:
        return []
    backward = function == "backward" and kernels.supports_backward is not None
    supports = _of_operator(kernels.supports_backward if backward else kernels.supports, arguments, first, last)
    loses = _of_operator(kernels.loses, arguments, first, last)
    gathered = functools.partial(_gathered, arguments, first, last)
    return _cuda.cuda_backends(name, function, first, supports, loses, gathered)


def triton_backends(
    name: str, kernels: TritonKernels | None, function: str, arguments: Any, first: int, last: int
) -> list[Backend]:
    """The Triton forward or backward, if there is one.

    The operator takes ``first`` arguments of its own, those of the op, and ``last`` of its own.
    """
    if kernels is None:
        return []
    supports = _of_operator(kernels.supports, arguments, first, last)
    if function == "backward" and (of_backward := kernels.supports_backward) is not None:
        supports = lambda *args: of_backward(args[-1], arguments(*args[first:-last]))  # noqa: E731
    op, function = kernels.op or name, kernels.prefix + function
    gathered = functools.partial(_gathered, arguments, first, last)
    return [_triton.triton_backend(op, function, first, supports, kernels.any_strides, gathered)]


def _gathered(arguments: Any, first: int, last: int, args: Sequence[Any]) -> Sequence[Any]:
    """The operator's arguments with those of the op as one."""
    return (*args[:first], arguments(*args[first:-last]), *args[-last:])


def _of_operator(
    function: Callable[..., str | None] | None, arguments: Any, first: int, last: int
) -> Callable[..., str | None] | None:
    """A function of the op's arguments as one of the operator's."""
    return None if function is None else lambda *args: function(arguments(*args[first:-last]))
