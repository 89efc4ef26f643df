"""What an op's ``op.py`` says of its kernels, and the backends that follow: compiled, CUDA and Triton.

Each has a forward and a backward, with the schemas of a `mmkernels._differentiable.DifferentiableOp`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmkernels import _cuda, _triton
from mmkernels._dispatch import Backend, native_op

_CPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class NativeKernels:
    """The private ops ``_<name>_fwd`` and ``_<name>_bwd`` of the compiled library, and what they cannot serve.

    Or, ``composed``, a forward and a backward in Python around torch's products and the private op ``_<name>``.
    """

    name: str
    supports: Callable[..., str | None] | None = None
    any_strides: bool = False  # whether they take floating tensors as they come
    # Names of the arguments that products read as they lie; the gradient of one with dense columns has dense columns.
    weights: tuple[str, ...] = ()
    composed: tuple[Callable[..., Any], Callable[..., Any]] | None = None


@dataclass(frozen=True)
class TritonKernels:
    """That the op's ``kernel_triton.py`` has ``forward`` and ``backward``, and what they cannot serve.

    They take the arguments of the two operators' schemas; ``supports`` those of the op alone, ``supports_backward`` the
    flags of the needed gradients before them. An op in the folder of another names that, and what its own two functions
    begin with.
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

    They take the library and the arguments of the two operators' schemas; the rest those of the op alone.
    """

    supports: Callable[..., str | None] | None = None
    supports_backward: Callable[..., str | None] | None = None  # default: as ``supports``
    loses: Callable[..., str | None] | None = None


def cpu_backend(kernels: NativeKernels, direction: str, first: int, arguments: str) -> Backend:
    """The compiled forward or backward; its own arguments, of that schema, start at position ``first``."""
    names = [argument.split()[-1].split("=")[0] for argument in arguments.split(",")]
    weights = {first + names.index(name) for name in kernels.weights}
    native, absent = native_op(f"_{kernels.name}" if kernels.composed else f"_{kernels.name}_{direction}")
    if kernels.composed:
        native = kernels.composed[first]

    def supports(*args: Any) -> str | None:
        if absent is not None:
            return absent
        tensor = args[first][0] if isinstance(args[first], (list, tuple)) else args[first]
        if not tensor.is_cpu:
            return _triton.inputs_are_on(tensor.device)
        if tensor.dtype not in _CPU_DTYPES:
            return f"{tensor.dtype} is served by the reference alone"
        return None if kernels.supports is None else kernels.supports(*args[first:])

    def run(*args: Any) -> Any:
        if kernels.any_strides:
            result = native(*args)
        else:
            result = native(*(x if i in weights else _triton.dense(x) for i, x in enumerate(args)))
        return list(result) if first else result

    return Backend("cpu", run, supports)


def cuda_backends(name: str, kernels: CudaKernels | None, function: str, first: int, end: int) -> list[Backend]:
    """As `triton_backends`, of the CUDA kernels."""
    if kernels is None:
        return []
    backward = function == "backward" and kernels.supports_backward is not None
    supports = _of_arguments(kernels.supports_backward if backward else kernels.supports, first, end)
    return _cuda.cuda_backends(name, function, first, supports, _of_arguments(kernels.loses, first, end))


def triton_backends(name: str, kernels: TritonKernels | None, function: str, first: int, end: int) -> list[Backend]:
    """The Triton forward or backward, if there is one; the op's own arguments are [first, −end) of its."""
    if kernels is None:
        return []
    supports = _of_arguments(kernels.supports, first, end)
    if function == "backward" and (of_backward := kernels.supports_backward) is not None:
        supports = lambda *args: of_backward(args[-1], *args[first:-end])  # noqa: E731
    op, function = kernels.op or name, kernels.prefix + function
    return [_triton.triton_backend(op, function, first, supports, kernels.any_strides)]


def _of_arguments(supports: Callable[..., str | None] | None, first: int, end: int) -> Callable[..., str | None] | None:
    return None if supports is None else lambda *args: supports(*args[first:-end])
