"""Who competes: the names that ``--providers`` takes, and what each is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels import _native, use_backend
from mmkernels._dispatch import backend_status

from .libraries import LIBRARIES
from .plugin import Provider
from .suite import Suite, Workload

COLUMNS = ("ours", "torch", "compiled")  # what every table has room for
SDPA_OPS = frozenset({"cross_attention", "joint_attention", "varlen_cross_attention"})  # whose baseline calls it
SDPA_KERNELS = {"cpu": ("math", "flash_attention"), "cuda": ("math", "flash_attention", "efficient_attention")}

NAMES = (
    "ours (always), torch (the best of eager torch), eager (the formula in plain torch), compiled (that under "
    "torch.compile), compiled@BACKEND (under another of its backends), ours@BACKEND or ours@ISA, sdpa@KERNEL (torch's "
    "attention kept to one kernel), another library, a benchmark's own (flash, flex, ...), those of --plugin, or all; "
    "which of them are here is said below"
)


def ours_elsewhere(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """``ours@...`` -> what ours runs inside of, for the backends and instruction sets that this machine has."""
    there = [name for name, reason in backend_status().items() if reason is None and name != "simt"]
    there = [name for name in there if device == "cuda" or name not in ("cuda", "triton")]
    there = [name for name in there if device == "cpu" or name != "cpu"]
    isas = _native.supported_isas() if device == "cpu" else []
    return {
        **{f"ours@{name}": partial(use_backend, name) for name in there},
        **{f"ours@{name}": partial(_native.use_isa, name) for name in isas},
    }


def _eager(workload: Workload, **arguments: object) -> Tensor:
    return workload.plain(**arguments)


def _on_sdpa_kernel(kernel: SDPBackend, workload: Workload, **arguments: object) -> Tensor:
    with sdpa_kernel(kernel):
        return workload.baseline(**arguments)


def builtin(device: str) -> dict[str, Provider]:
    """The providers that need no plugin and are no column of their own."""
    found = {"eager": Provider("eager", _eager)}
    for kernel in SDPA_KERNELS[device]:
        name = f"sdpa@{kernel.removesuffix('_attention')}"
        run = partial(_on_sdpa_kernel, getattr(SDPBackend, kernel.upper()))
        found[name] = Provider(name, run, SDPA_OPS)
    here = {name: library.provider for name, library in LIBRARIES.items() if library.absent(device) is None}
    return {**found, **here}


def presence() -> str:
    """Which providers this machine has for its CPU and, with a GPU, for that; which libraries it lacks, and why."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    lines = []
    for device in devices:
        names = (*COLUMNS, *ours_elsewhere(device), *builtin(device))
        lines.append(f"here, on {device}: {', '.join(names)}")
    absent = {name: reasons for name, library in LIBRARIES.items() if (reasons := [*map(library.absent, devices)])}
    lines += [f"not here: {name}, {reasons[0]}" for name, reasons in absent.items() if all(reasons)]
    zentorch = importlib.util.find_spec("zentorch") is not None
    lines.append("here: compiled@zentorch" if zentorch else "not here: compiled@zentorch, zentorch not installed")
    return "\n".join(lines)


def compile_backend(name: str) -> str | None:
    """The backend of ``compiled@BACKEND``, None where the name is of another kind.

    Raises:
        ValueError: torch.compile has no such backend, and no package of that name brings one.
    """
    column, _, backend = name.partition("@")
    if column != "compiled" or not backend:
        return None
    # A package such as zentorch registers its backend when it is imported.
    if importlib.util.find_spec(backend) is not None:
        importlib.import_module(backend)
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"{name}: torch.compile has no backend {backend!r} here; it has {', '.join(known)}")
    return backend


def own_contenders(suites: Mapping[str, Suite], device: str) -> set[str]:
    """The names of what the benchmarks themselves bring beside torch's plain and compiled code."""
    works = [
        work
        for suite in suites.values()
        for groups in (suite.forward, suite.training)
        for workloads in groups.values()
        for work in workloads
    ]
    return {name for work in works for name in (*work.others(device), *work.compiling(device))} | {"triton"}


def selected(
    asked: Sequence[str], suites: Mapping[str, Suite], plugged: Mapping[str, Provider], device: str
) -> frozenset[str]:
    """The names of what competes. With none asked for: what the benchmarks and the plugin bring; ours always.

    Raises:
        ValueError: a name that nothing has.
    """
    own = own_contenders(suites, device)
    if not asked:
        return frozenset({*COLUMNS, *own, *plugged})
    everything = {*COLUMNS, *own, *plugged, *builtin(device), *ours_elsewhere(device)}
    names: set[str] = {"ours"}
    for name in asked:
        if name == "all":
            names |= everything
        elif name in everything or compile_backend(name) is not None:
            names.add(name)
        elif name in LIBRARIES:
            raise ValueError(f"{name}: {LIBRARIES[name].absent(device)}")
        else:
            raise ValueError(f"expected {', '.join(sorted(everything))}, compiled@BACKEND or all; got {name!r}")
    return frozenset(names)
