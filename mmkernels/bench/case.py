"""What a file ``benchmarks/<op>.py`` provides.

BASELINE = "torch SDPA"                  # what the `torch` function of its problems calls
def cases() -> list[Case]: ...           # one per row of the table, dtype apart
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One case's inputs and the functions that compete on them. Each function takes the leaves and nothing else; masks,
    lengths and flags are bound in. Leaves are the floating inputs, and a training pass takes the gradient of every one.
    """

    leaves: tuple[Tensor, ...]
    names: tuple[str, ...]
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    # The formula in plain PyTorch: in float64 it is the oracle of the check, under torch.compile a contender.
    eager: Callable[..., Tensor]
    # What else there is for the same result, by name; where one cannot serve the case its column has a gap.
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # As others, but the first call compiles for seconds, which is paid from the budget's share for that.
    compiling: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the table, dtype apart."""

    group: str  # "forward", "training", ...: geometric means are taken over a group
    shape: str  # as it reads in the table
    note: str  # what has such a shape
    problem: Callable[[torch.dtype], Problem]
    flops: float
    bytes: Callable[[int], float]  # of the item size: the least traffic, each input read and each output written once
    training: bool = False  # forward and backward, otherwise forward under no_grad
    quick: bool = False  # part of a --quick run
    gpu: bool = False  # too large for a CPU's run


def benchmarks_dir() -> Path:
    """The ``benchmarks`` folder of the checkout that this package runs from, or else of the current directory."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks").is_dir():
            return root / "benchmarks"
    raise FileNotFoundError("no benchmarks/ folder: run from a checkout of the project")


def available_ops(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load(folder: Path, op: str) -> ModuleType:
    """Import ``<folder>/<op>.py``."""
    name = f"_mmkernels_benchmark_{op}"
    spec = importlib.util.spec_from_file_location(name, folder / f"{op}.py")
    if spec is None or spec.loader is None or not (folder / f"{op}.py").is_file():
        raise ValueError(f"bench: no benchmark named {op!r}; available: {', '.join(available_ops(folder))}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    return module
