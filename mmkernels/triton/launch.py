"""The one way in which kernels are launched: run on a device or in the interpreter, or compiled for a given target.

A kernel takes tensors, tuples of tensors, numbers and ``tl.constexpr`` constants. Lengths and batch sizes are listed in
its ``do_not_specialize``, so that a new one compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from mmkernels import _triton
from mmkernels.triton.interpreter import fix_triton_interpreter

if _triton.interpreting():
    fix_triton_interpreter()

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """Constants of a kernel that are a matter of speed alone, and how many warps and pipeline stages it gets."""

    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def __str__(self) -> str:
        sizes = " ".join(f"{name.lower()} {size}" for name, size in self.constants.items())
        return f"{sizes}, {self.num_warps} warps, {self.num_stages} stages".removeprefix(", ")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, and 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Lengths, for a kernel to take as a tuple and to read with `mmkernels.triton.math.number`.

    ``do_not_specialize`` does not reach into tuples: triton would compile for whether a number there is 1 or a multiple
    of 16, which 2n + 3 never is.
    """
    return tuple([2 * n + 3 for n in numbers])


def tiles(config: Config, rows: int, columns: int) -> int:
    """How many of the config's BLOCK_M x BLOCK_N tiles cover a matrix."""
    return ceil_div(rows, config.constants["BLOCK_M"]) * ceil_div(columns, config.constants["BLOCK_N"])


@functools.cache
def _target_of(device: torch.device) -> GPUTarget:
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


def target(tensor: Tensor) -> GPUTarget:
    """What a kernel on this tensor is compiled for; in the interpreter, as for an H100."""
    if _triton.compile_target is not None:
        return _triton.compile_target
    return _target_of(tensor.device) if tensor.is_cuda else GPUTarget("cuda", 90, 32)


def dot_precision(tensor: Tensor) -> str:
    """``input_precision`` of a ``tl.dot`` of float32: what torch was told to multiply its own matrices with.

    Three tf32 products make up for the bits that one loses, and run on tensor cores; AMD multiplies float32 as it is.
    """
    if target(tensor).backend != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def launch(
    kernel: Any,
    grid: Grid | Callable[[Mapping[str, int]], Grid],
    *args: Any,
    config: Config | Sequence[Config] = Config(),
    **constants: Any,
) -> None:
    """Run a kernel on the current stream of its first tensor's device.

    Args:
        kernel: a ``triton.jit`` function. Running it twice gives what running it once does.
        grid: how many programs there are in up to three dims; nothing runs where one is 0. Or a function of the
            config's constants.
        args: its arguments, constants aside.
        config: the table's choice; of several the first. ``MMKERNELS_AUTOTUNE=1`` races them instead, and one alone
            against itself with other warps and stages.
        constants: its constants that have nothing to do with speed.
    """
    configs = [config] if isinstance(config, Config) else list(config)
    device = _device_of(args)
    if device < 0:
        _run(kernel, grid, args, configs[0], constants, _interpret_or_compile)
    elif device == torch.cuda.current_device():
        _run_on_device(device, kernel, grid, args, configs, constants)
    else:
        with torch.cuda.device(device):
            _run_on_device(device, kernel, grid, args, configs, constants)


def _device_of(args: Sequence[Any]) -> int:
    """The index of the first tensor's device; -1 for one that is on no GPU."""
    for arg in args:
        for x in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(x, Tensor):
                return x.get_device() if x.is_cuda else -1
    raise ValueError("launch: expected a tensor among the arguments of a kernel")


def _run(
    kernel: Any,
    grid: Grid | Callable[[Mapping[str, int]], Grid],
    args: Sequence[Any],
    config: Config,
    constants: Mapping[str, Any],
    run: Callable[..., None],
) -> None:
    size = grid(config.constants) if callable(grid) else grid
    if 0 not in size:
        run(kernel, size, args, config, constants)


def _options(config: Config, constants: Mapping[str, Any]) -> dict[str, Any]:
    return {**constants, **config.constants, "num_warps": config.num_warps, "num_stages": config.num_stages}


def _interpret_or_compile(
    kernel: Any, grid: Grid, args: Sequence[Any], config: Config, constants: Mapping[str, Any]
) -> None:
    options = _options(config, constants)
    if _triton.compile_target is None:
        kernel[grid](*args, **options)
    else:
        _compiled.append(Compiled(kernel.__name__, config, kernel.warmup(*args, grid=grid, **options)))


def _run_on_device(
    device: int,
    kernel: Any,
    grid: Grid | Callable[[Mapping[str, int]], Grid],
    args: Sequence[Any],
    configs: Sequence[Config],
    constants: Mapping[str, Any],
) -> None:
    run = functools.partial(_launch_again, device)
    config = configs[0]
    if _AUTOTUNE:
        config = _raced(kernel, args, constants, configs, lambda c: _run(kernel, grid, args, c, constants, run))
    _run(kernel, grid, args, config, constants, run)


# --- launching again what was compiled --------------------------------------------------------------------------------
# What triton does on the way to a kernel that it has compiled takes the host longer than a small kernel takes the GPU.

_specialized = getattr(triton.runtime.jit, "native_specialize_impl", None)  # types, and what triton compiles for
_launchers: dict[Any, tuple[Any, ...]] = {}


@functools.cache
def _backend(device: int) -> Any:
    return make_backend(_target_of(torch.device("cuda", device)))


def _launch_again(
    device: int, kernel: Any, grid: Grid, args: Sequence[Any], config: Config, constants: Mapping[str, Any]
) -> None:
    """Launch by way of triton where it may have to compile or a profiler listens, else directly."""
    if _specialized is None or _is_listening():
        kernel[grid](*args, **_options(config, constants))
        return
    signature = _specialized(_backend(device), tuple(args), False, True, True)
    key = (id(kernel), device, *constants.items(), config.num_warps, config.num_stages, *config.constants.items())
    found = _launchers.get((key, signature))
    if found is None:
        options = _options(config, constants)
        compiled = kernel[grid](*args, **options)
        last = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _launchers[key, signature] = (compiled.run, compiled.function, compiled.packed_metadata, last)
        return
    run, function, metadata, last = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = triton.runtime.driver.active.get_current_stream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *args, *last)


def _is_listening() -> bool:
    """Whether anything asked triton to be told of launches."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# --- autotuning -------------------------------------------------------------------------------------------------------

_winners: dict[Any, Config] = {}


_AUTOTUNE = os.environ.get("MMKERNELS_AUTOTUNE", "0") not in ("", "0")


def _candidates(configs: Sequence[Config]) -> Sequence[Config]:
    if len(configs) > 1:
        return configs
    return [replace(configs[0], num_warps=warps, num_stages=stages) for warps in (2, 4, 8) for stages in (1, 2, 3, 4)]


def _raced(
    kernel: Any,
    args: Sequence[Any],
    constants: Mapping[str, Any],
    configs: Sequence[Config],
    run: Callable[[Config], None],
) -> Config:
    """The fastest config for this kernel at these sizes, found once."""

    def milliseconds(candidate: Config) -> float:
        try:
            return triton.testing.do_bench(lambda: run(candidate), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources:  # more shared memory or registers than there are
            return float("inf")

    sizes = tuple(
        (*t.shape, t.dtype) if isinstance(t, Tensor) else t for a in args for t in (a if isinstance(a, tuple) else (a,))
    )
    key = (kernel.__name__, sizes, tuple(constants.items()))
    if key not in _winners:
        _winners[key] = min(_candidates(configs), key=milliseconds)
    return _winners[key]


# --- compiling without a device ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What became of one launch while compiling."""

    kernel: str
    config: Config
    binary: Any  # triton.compiler.CompiledKernel


_compiled: list[Compiled] = []


class _Driver:
    """Stands in for a device's driver, as far as compiling asks for one."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:  # what triton keeps compiled kernels by
        return self._target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return "void*"


@contextlib.contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Calls on meta tensors compile their Triton kernels inside the block and run nothing; yields what was compiled."""
    if _triton.interpreting():
        raise RuntimeError("compiling_for: TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled")
    _triton.compile_target = target
    triton.runtime.driver.set_active(_Driver(target))
    _compiled.clear()
    try:
        yield _compiled
    finally:
        _triton.compile_target = None
        if torch.cuda.is_available():
            triton.runtime.driver.reset_active()


@contextlib.contextmanager
def sources_for(target: GPUTarget) -> Iterator[list[str]]:
    """As `compiling_for`, and compiles nothing: yields a digest of what each kernel would be compiled from, triton and
    the target aside, without the paths and addresses that are in the keys of triton's own cache. A kernel that this
    process has compiled for the target already is left out.
    """
    found: list[str] = []

    def instead_of_compiling(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        constants = [(name, getattr(value, "cache_key", value)) for name, value in compile["constants"].items()]
        options = [compile[name] for name in ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")]
        made_of = repr((fn.jit_function.cache_key, compile["signature"], constants, compile["configs"], options))
        found.append(hashlib.sha256(made_of.encode()).hexdigest())
        return True

    with compiling_for(target):
        triton.knobs.runtime.jit_cache_hook = instead_of_compiling
        try:
            yield found
        finally:
            triton.knobs.runtime.jit_cache_hook = None
