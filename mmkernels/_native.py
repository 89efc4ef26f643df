"""The compiled library: whether it is there, why not, and which of its instruction sets is in use.

Environment, read once at import:

- ``MMKERNELS_REQUIRE_NATIVE=1``: an absent library is an ``ImportError`` instead of a warning.
- ``MMKERNELS_ISA=name``: use this instruction set instead of the best one that the CPU supports.
- ``MMKERNELS_LIBRARY_DIR=path``: load the library from this directory instead of from the package (a sanitizer build).
- ``MMKERNELS_BACKEND=reference``: an absent library is no reason for a warning.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # loads the libraries that ours links against

__all__ = [
    "available",
    "build_info",
    "compiled_isas",
    "default_isa",
    "isa",
    "library_path",
    "reason",
    "set_isa",
    "supported_isas",
    "use_isa",
    "why_no_amx",
]

_MODULE = "mmkernels._C"


def _import_library() -> ModuleType:
    directory = os.environ.get("MMKERNELS_LIBRARY_DIR")
    if not directory:
        return importlib.import_module(_MODULE)
    candidates = [Path(directory) / ("_C" + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in candidates if p.exists()), None)
    if path is None:
        raise ImportError(f"MMKERNELS_LIBRARY_DIR={directory!r} holds no {candidates[0].name}")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_MODULE] = module
    return module


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = _import_library()
    except ImportError as error:
        return None, str(error)
    # ATen's C++ interface changes between releases: a library that loads by luck may still misread a tensor.
    built, running = (".".join(v.split(".")[:2]) for v in (module.build_info()["torch"], torch.__version__))
    if built != running:
        return None, f"it was built for torch {built} and this is torch {running}: install mmkernels again"
    return module, None


_library, _reason = _load()


def available() -> bool:
    """Whether the compiled library is loaded."""
    return _library is not None


def reason() -> str | None:
    """Why the compiled library is not loaded; None where it is."""
    return _reason


def library_path() -> str | None:
    """The file of the compiled library."""
    return None if _library is None else _library.__file__


def build_info() -> dict[str, str]:
    """What the library was built with: compiler, torch version and, in such builds, sanitizers."""
    return {} if _library is None else _library.build_info()


def compiled_isas() -> list[str]:
    """Instruction sets the library was compiled for, lowest first."""
    return [] if _library is None else _library.compiled_isas()


def supported_isas() -> list[str]:
    """The compiled instruction sets that this CPU can run, lowest first."""
    return [] if _library is None else _library.supported_isas()


def default_isa() -> str:
    """The instruction set that runs where none is asked for: of those that this CPU can run the one it runs best."""
    return "none" if _library is None else _library.default_isa()


def has_bf16_products() -> bool:
    """Whether this CPU has instructions for products of bfloat16, as torch's are then worth taking."""
    return _library is not None and _library.has_bf16_products()


def why_no_amx() -> str | None:
    """Why bfloat16 is not multiplied on AMX's tiles; None where it can be."""
    return (_reason if _library is None else _library.why_no_amx()) or None


def isa() -> str:
    """The instruction set in use; "none" without the library."""
    return "none" if _library is None else _library.isa()


def door(name: str) -> Callable[..., Any] | None:
    """The library's function that serves an op's plain eager calls, or None where there is none."""
    return getattr(_library, name, None)


def open_door(
    name: str, outputs: int, kept: Sequence[tuple[bool, Sequence[int], int]], any_strides: Sequence[int]
) -> int | None:
    """The number by which ``door("differentiable_door")`` knows an op's kernels, or None without the library.

    ``any_strides`` are the positions of the arguments that the kernels take as they come.
    """
    opened: int | None = (
        None if _library is None else _library.open_differentiable_door(name, outputs, kept, any_strides)
    )
    return opened


def set_isa(name: str) -> None:
    """Use the instruction set `name` from now on, in every thread.

    Raises:
        ValueError: the library was not compiled for it, or this CPU cannot run it.
        RuntimeError: there is no compiled library.
    """
    if _library is None:
        raise RuntimeError(f"set_isa: the compiled library of mmkernels is not available: {_reason}")
    if name not in supported_isas():
        why = "this CPU cannot run it" if name in compiled_isas() else "the library was not compiled for it"
        raise ValueError(f"set_isa: instruction set {name!r}: {why}; supported here: {', '.join(supported_isas())}")
    _library.set_isa(name)


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """The library on one instruction set inside the block, in every thread; raises as `set_isa` does."""
    before = isa()
    set_isa(name)
    try:
        yield
    finally:
        set_isa(before)


def _apply_environment() -> None:
    if _library is None:
        message = f"the compiled library of mmkernels is not available: {_reason}"
        if os.environ.get("MMKERNELS_REQUIRE_NATIVE", "0") not in ("", "0"):
            raise ImportError(f"{message} (MMKERNELS_REQUIRE_NATIVE is set)")
        if os.environ.get("MMKERNELS_BACKEND") != "reference":
            warnings.warn(
                f"{message}. On the CPU every op runs on its PyTorch reference: correct, and slower. "
                "MMKERNELS_BACKEND=reference chooses that without this warning.",
                RuntimeWarning,
                stacklevel=2,
            )
    elif name := os.environ.get("MMKERNELS_ISA"):
        try:
            set_isa(name)
        except ValueError as error:
            raise ValueError(f"MMKERNELS_ISA={name}: {error}") from None


_apply_environment()
