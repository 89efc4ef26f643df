"""Whether Triton kernels can run here, and the backend of an op that has them. Nothing here imports triton.

The kernels of an op are in ``mmkernels/ops/<op>/kernel_triton.py``, imported by the first call they serve. They run on
CUDA and ROCm tensors; with ``TRITON_INTERPRET=1`` in the environment and the backend forced also on CPU tensors, in
Triton's interpreter; and on meta tensors while `mmkernels.triton.launch.compiling_for` compiles instead of running.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._dispatch import Backend, is_forced

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# What kernels are compiled for, instead of run; None everywhere but inside `compiling_for`.
compile_target: Any = None


@functools.cache
def absent() -> str | None:
    """Why no Triton kernel can run; None where triton is installed."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def status() -> str | None:
    """None where this machine can run Triton kernels, or why it cannot."""
    if absent() or interpreting() or torch.cuda.is_available():
        return absent()
    return "torch sees no GPU; with TRITON_INTERPRET=1 the kernels run on CPU tensors"


@functools.cache
def inputs_are_on(device: torch.device) -> str:
    """The reason of a backend for other devices."""
    return f"the inputs are on {device}"


def _device_reason(tensor: Tensor) -> str | None:
    if tensor.is_cuda:
        return "TRITON_INTERPRET=1 is set" if interpreting() else None
    if tensor.is_cpu and interpreting():
        return None if is_forced("triton") else "the interpreter serves CPU tensors only where it is forced to"
    if tensor.is_meta and compile_target is not None:
        return None
    return inputs_are_on(tensor.device)


def triton_backend(
    op: str,
    function: str,
    position: int = 0,
    supports: Callable[..., str | None] | None = None,
    any_strides: bool = False,
    gathered: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
) -> Backend:
    """``function`` of the op's ``kernel_triton.py`` as a backend.

    Args:
        op: the folder under ``mmkernels/ops``.
        function: takes what ``gathered`` makes of the arguments of the operator's schema, floating tensors with a dense
            last dim.
        position: of an argument that is a tensor, or a list of them, of the call's dtype and device.
        supports: the arguments -> why the kernels cannot serve them, or None.
        any_strides: the function takes floating tensors as they come.
        gathered: the arguments -> what the function takes.
    """

    @functools.cache
    def kernels() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(importlib.import_module(f"mmkernels.ops.{op}.kernel_triton"), function)
        return loaded

    def why_not(*args: Any) -> str | None:
        if reason := absent():
            return reason
        tensor = args[position][0] if isinstance(args[position], (list, tuple)) else args[position]
        if reason := _device_reason(tensor):
            return reason
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} is served by the reference alone"
        return None if supports is None else supports(*args)

    def run(*args: Any) -> Any:
        return kernels()(*gathered(args if any_strides else [dense(x) for x in args]))

    return Backend("triton", run, why_not)


def dense(x: Any) -> Any:
    """Floating tensors, in lists or not, with a last dim that is contiguous; copies only those that are not."""
    if isinstance(x, Tensor):
        fits = x.is_contiguous() or not x.is_floating_point() or x.stride(-1) == 1 or x.shape[-1] <= 1
        return x if fits else x.contiguous()
    return list(map(dense, x)) if isinstance(x, (list, tuple)) else x
