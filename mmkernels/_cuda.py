"""The compiled CUDA kernels: whether they can run here, and the backends of an op that has them.

``libmmkernels_cuda.so`` in this folder holds them for CUDA tensors. Test builds have ``libmmkernels_simt.so`` too, the
same sources, compiled for the emulator of ``tests/simt``, which serves CPU tensors where the backend "simt" is
forced. The first call that asks for a library loads it. The Python side of an op's kernels is its ``kernel_cuda.py``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels._dispatch import Backend, is_forced
from mmkernels._triton import dense, inputs_are_on

_DTYPES = frozenset({torch.bfloat16, torch.float16})
_LEAST_CAPABILITY = (8, 0)


class Library:
    """One of the two libraries. Calling it launches kernels of it, on the tensors' own device and stream."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(__file__).with_name(f"libmmkernels_{name}.so")

    @functools.cached_property
    def absent(self) -> str | None:
        """Why it cannot be used, or None; loads it."""
        if not self.path.exists():
            return f"{self.path.name} was not built"
        try:
            torch.ops.load_library(self.path)
        except OSError as error:
            return f"{self.path.name} cannot be loaded: {error}"
        return None

    @functools.cache  # noqa: B019  # there are two of it, and they stay
    def _launcher(self, name: str) -> Callable[..., None]:
        launcher: Callable[..., None] = getattr(torch.ops.mmkernels, f"_{self.name}_{name}").default
        return launcher

    def __call__(self, name: str, first: Tensor, *args: Any) -> None:
        """Launch ``name`` with a tensor and the other arguments of its schema, all but the stream."""
        launcher = self._launcher(name)
        if not first.is_cuda:
            launcher(first, *args, 0)
            return
        device = first.get_device()
        if device == torch.cuda.current_device():
            launcher(first, *args, torch._C._cuda_getCurrentRawStream(device))
            return
        with torch.cuda.device(device):
            launcher(first, *args, torch._C._cuda_getCurrentRawStream(device))


CUDA = Library("cuda")
SIMT = Library("simt")


def status() -> str | None:
    """None where this machine can run CUDA kernels, or why it cannot."""
    if not CUDA.path.exists():
        return CUDA.absent
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    return CUDA.absent


def simt_status() -> str | None:
    """None where the emulator of the CUDA kernels is there, or why it is not."""
    return SIMT.absent


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    capability = _capability(device)
    if capability == (0, 0):
        return inputs_are_on(device)
    if capability < _LEAST_CAPABILITY:
        return f"{device} has compute capability {'.'.join(map(str, capability))}, and 8.0 is the least"
    return None


def has_warpgroup_products(device: torch.device) -> bool:
    """Whether the GPU, of a data centre, multiplies at twice the rate of mma.sync by instructions of its own."""
    return (9, 0) <= _capability(device) < (12, 0)


def _why_not_here(library: Library, tensor: Tensor) -> str | None:
    if library is SIMT:
        if not is_forced("simt"):
            return "the emulator serves calls only where it is forced to"
        reason = None if tensor.is_cpu else inputs_are_on(tensor.device)
    else:
        reason = _device_reason(tensor.device)
    return reason or library.absent


@functools.cache
def shared_memory(device: torch.device) -> int:
    """The most bytes that a block can ask for; in the emulator an H100's."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


def _backend(
    library: Library,
    op: str,
    function: str,
    position: int,
    supports: Callable[..., str | None] | None,
    loses: Callable[..., str | None] | None,
    gathered: Callable[[Sequence[Any]], Sequence[Any]],
) -> Backend:
    @functools.cache
    def kernels() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(importlib.import_module(f"mmkernels.ops.{op}.kernel_cuda"), function)
        return loaded

    def why_not(*args: Any) -> str | None:
        tensor = args[position][0] if isinstance(args[position], (list, tuple)) else args[position]
        if reason := _why_not_here(library, tensor):
            return reason
        if tensor.dtype not in _DTYPES:
            return f"{tensor.dtype} is not among the 16-bit dtypes of its kernels"
        if supports is not None and (reason := supports(*args)):
            return reason
        return None if loses is None or is_forced(library.name) else loses(*args)

    def run(*args: Any) -> Any:
        return kernels()(library, *gathered([dense(x) for x in args]))

    return Backend(library.name, run, why_not, for_tests=library is SIMT)


def cuda_backends(
    op: str,
    function: str,
    position: int = 0,
    supports: Callable[..., str | None] | None = None,
    loses: Callable[..., str | None] | None = None,
    gathered: Callable[[Sequence[Any]], Sequence[Any]] = tuple,
) -> list[Backend]:
    """``function`` of the op's ``kernel_cuda.py`` as the backend "cuda", and where there is an emulator as "simt".

    Args:
        op: the folder under ``mmkernels/ops``.
        function: takes the library and what ``gathered`` makes of the arguments of the operator's schema, floating
            tensors with a dense last dim.
        position: of an argument that is a tensor, or a list of them, of the call's dtype and device.
        supports: the arguments -> why the kernels cannot serve them, or None.
        loses: the arguments -> why the next backend serves them faster, or None; a forced backend is not asked.
        gathered: the arguments -> what the function takes.
    """
    libraries = [CUDA, SIMT] if SIMT.path.exists() else [CUDA]
    return [_backend(library, op, function, position, supports, loses, gathered) for library in libraries]


def rows_lose(elements: int) -> str | None:
    """Why another kernel passes over rows faster: Triton's has more of them under way, which decides from where on a
    GPU takes longer than the host takes to launch, some 30 MB.
    """
    return f"{elements} elements are for the kernel that has more of them in flight" if elements > 2**23 else None


def products_lose(rows: int, features: int, tensor: Tensor) -> str | None:
    """Why another kernel multiplies faster: with a tile for every multiprocessor, Hopper's own instructions decide."""
    tiles = -(-rows // 128) * -(-features // 128)
    if tiles >= 132 and has_warpgroup_products(tensor.device):
        return f"{rows} x {features} is a product for the matrix instructions of its compute capability"
    return None


def misaligned(*tensors: Tensor | None) -> str | None:
    """Why tensors cannot be read 16 bytes at a time along their last dim, or None."""
    for t in tensors:
        if t is None or not t.numel():
            continue
        if t.data_ptr() % 16 or any(s % 8 for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1):
            return "a tensor or a step along one of its dims is no multiple of 16 bytes"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that cannot be read 16 bytes at a time."""
    return tensor if misaligned(tensor) is None else tensor.clone(memory_format=torch.contiguous_format)
