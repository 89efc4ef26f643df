"""Ops and providers of one's own: a file given by ``--plugin`` names them with the decorators `op` and `provider`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from .suite import Suite

Run = TypeVar("Run", bound=Callable[..., Tensor])
MakeSuite = TypeVar("MakeSuite", bound=Callable[[], Suite])


@dataclass(frozen=True)
class Provider:
    """A contender by name: `run(workload, **arguments)` computes what the workload's `plain` does of the arguments."""

    name: str
    run: Callable[..., Tensor]
    ops: frozenset[str] = frozenset()  # those it can serve; none named: all

    def serves(self, op: str) -> bool:
        return not self.ops or op in self.ops


@dataclass
class Plugin:
    """What a plugin file added, by name."""

    ops: dict[str, Callable[[], Suite]] = field(default_factory=dict)
    providers: dict[str, Provider] = field(default_factory=dict)


_added = Plugin()


def op(make: MakeSuite) -> MakeSuite:
    """Decorate a function that returns a `Suite`: its name is the op's name in tables and on the command line."""
    _added.ops[make.__name__] = make
    return make


def provider(name: str, *, ops: Sequence[str] = ()) -> Callable[[Run], Run]:
    """Decorate ``def run(workload, **arguments)``, a contender called `name`, for the named ops or for all of them.

    `arguments` are those that the workload's `plain` takes; the result has to be the same as plain torch's. Where the
    provider cannot serve a workload it raises, and the table has a gap.
    """

    def added(run: Run) -> Run:
        _added.providers[name] = Provider(name, run, frozenset(ops))
        return run

    return added


def load(path: Path) -> Plugin:
    """What the file adds.

    Raises:
        ValueError: there is no such file, it fails when it is run, or it adds nothing.
    """
    name = f"_mmkernels_bench_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"expected a Python file; {path} is none")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    _added.ops.clear()
    _added.providers.clear()
    try:
        spec.loader.exec_module(module)
    except Exception as failure:
        raise ValueError(f"{path} fails when it is run: {type(failure).__name__}: {failure}") from failure
    if not (_added.ops or _added.providers):
        raise ValueError(f"{path} decorates nothing with mmkernels.bench.op or mmkernels.bench.provider")
    return Plugin(dict(_added.ops), dict(_added.providers))
