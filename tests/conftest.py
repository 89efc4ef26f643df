"""Which implementations the op tests run on: the reference, the compiled library on each instruction set, Triton."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from cuda_cases import schedule
from environment import ALONE, DEVICE
from torch.testing._internal.optests.generate_tests import OpCheckError

import mmkernels as mmk
from mmkernels import _cuda, _native, _triton
from mmkernels.testing import Implementation


def why_no_native(private_op: str = "_cross_attention_fwd") -> str | None:
    """Why tests of the compiled library are to be skipped; None where they run, and where they must."""
    if os.environ.get("MMKERNELS_REQUIRE_NATIVE", "0") not in ("", "0"):
        return None
    if os.environ.get("MMKERNELS_BACKEND") == "reference":
        return "MMKERNELS_BACKEND=reference"
    if not _native.available():
        return f"no native library: {_native.reason()}"
    if not hasattr(torch.ops.mmkernels, private_op):
        return f"the native library has no {private_op}"
    return None


NATIVE_ABSENT = why_no_native() if DEVICE == "cpu" else f"the tensors are on {DEVICE}"
native_only = pytest.mark.skipif(NATIVE_ABSENT is not None, reason=str(NATIVE_ABSENT))


REFERENCE = Implementation("reference")
TRITON = Implementation("triton")
NATIVE = [Implementation("cpu", isa) for isa in _native.supported_isas()] or [Implementation("cpu", "absent")]


def use_implementation(implementation: Implementation) -> Iterator[str]:
    """Force the implementation; yields its backend's name."""
    with implementation.forced():
        yield implementation.backend


TRITON_PARAMETER = pytest.param(
    TRITON, id="triton", marks=pytest.mark.skipif(_triton.status() is not None, reason=str(_triton.status()))
)
SIMT_ABSENT = _cuda.simt_status() if DEVICE == "cpu" else f"the tensors are on {DEVICE}"
_built_for_tests = "emulated" in _native.compiled_isas() and _native.library_path() is not None
if SIMT_ABSENT and DEVICE == "cpu" and _built_for_tests and not os.environ.get("MMKERNELS_LIBRARY_DIR"):
    raise RuntimeError(f"this is a test build, and yet there is no emulator of CUDA kernels: {SIMT_ABSENT}")
CUDA = Implementation("simt" if DEVICE == "cpu" else "cuda")
CUDA_ABSENT = SIMT_ABSENT if DEVICE == "cpu" else _cuda.status()
CUDA_PARAMETER = pytest.param(
    CUDA, id=CUDA.backend, marks=pytest.mark.skipif(CUDA_ABSENT is not None, reason=str(CUDA_ABSENT))
)
NATIVE_PARAMETERS = [pytest.param(i, marks=native_only, id=str(i)) for i in NATIVE]
REFERENCE_PARAMETER = pytest.param(REFERENCE, id="reference")

# What the tests that choose a backend run on: all of it; one of the kernels beside the reference; the fuzzers' share.
if ALONE is not None:
    _alone = TRITON_PARAMETER if ALONE == "triton" else CUDA_PARAMETER
    EVERY, EITHER, FUZZED = [_alone], [_alone], [Implementation(ALONE)]
elif DEVICE != "cpu":
    EVERY = EITHER = [REFERENCE_PARAMETER, TRITON_PARAMETER]
    FUZZED = [TRITON]
else:
    EVERY = [REFERENCE_PARAMETER, *NATIVE_PARAMETERS]
    EITHER = [REFERENCE_PARAMETER, pytest.param(Implementation("cpu"), id="cpu", marks=native_only)]
    FUZZED = [REFERENCE] if NATIVE_ABSENT else NATIVE


@pytest.fixture(params=EVERY)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the forced backend: the reference, then the compiled library on every instruction set."""
    yield from use_implementation(request.param)


@pytest.fixture(params=[TRITON_PARAMETER])
def triton_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, Triton alone, on a GPU or in the interpreter."""
    yield from use_implementation(request.param)


@pytest.fixture(params=[CUDA_PARAMETER])
def cuda_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, the CUDA kernels alone, on a GPU or in the emulator."""
    yield from use_implementation(request.param)


@pytest.fixture(params=(0, 1, 7))
def any_schedule(request: pytest.FixtureRequest) -> Iterator[None]:
    """The emulator runs warps and lanes in their order, then in two others."""
    with contextlib.nullcontext() if SIMT_ABSENT else schedule(request.param):
        yield


@pytest.fixture(params=EITHER)
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, on one instruction set, the machine's own: for tests that the kernel hardly matters to."""
    yield from use_implementation(request.param)


@pytest.fixture(params=NATIVE_PARAMETERS)
def native_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, the compiled library alone."""
    yield from use_implementation(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tiles are for pairs of bfloat16: another dtype runs the code beside them, and once is enough for it."""

    def runs_twice(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        on_tiles = any(str(p) in ("cpu amx", "cpu amx_portable") for p in parameters.values())
        return on_tiles and parameters.get("dtype", torch.bfloat16) is not torch.bfloat16

    twice = [item for item in items if runs_twice(item)]
    if twice:
        config.hook.pytest_deselected(items=twice)
        items[:] = [item for item in items if not runs_twice(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Where all runs on one kind of kernels, and on a GPU, what these do not serve is skipped, with their reason; not
    what came to them on another device, which is a test's own fault."""
    try:
        return (yield)
    except (mmk.UnsupportedError, OpCheckError) as error:
        kinds = [ALONE] if ALONE else [] if DEVICE == "cpu" else ["triton", "cuda"]
        declined = any(f"backend {kind!r} was forced and cannot serve" in str(error) for kind in kinds)
        if declined and "the inputs are on" not in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed() -> None:
    """One thread per test: pytest already runs on every core. Tests of threading set their own number."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
