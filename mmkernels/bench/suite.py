"""What a file ``benchmarks/<op>.py`` declares: its `SUITE`, the rows of a table, made of workloads.

A workload is one shape of the op with everything that competes on it. What follows from that is here: leaves and their
names, dtypes, the oracle in float64, bytes, groups of rows.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .case import Case, Problem

Arguments = Mapping[str, Any]  # by the names that the op has for them

# The field of a workload that is its length, the first that it has: what grows while a model stays the same.
LENGTHS = ("keys", "queries", "lengths", "length", "x", "rows", "pairs", "batch")


@dataclass(frozen=True)
class Workload:
    """One shape of an op. A subclass has the sizes as its fields and ``__str__`` as they read in the table, says what
    `ours` and `plain` do, and overrides what else is not as below.
    """

    note: str  # what has such a shape
    quick: bool = field(default=False, kw_only=True)  # part of a --quick run
    gpu: bool = field(default=False, kw_only=True)  # too large for a CPU's run

    backward_flops: ClassVar[float] = 2.0  # of the backward, in flops of the forward: a product has two gradients
    kept: ClassVar[int] = 0  # how often what is as large as the output moves more, for what forward leaves to backward
    any_dtype: ClassVar[tuple[str, ...]] = ()  # inputs that keep the dtype they were made with

    def inputs(self) -> Mapping[str, Tensor | Sequence[Tensor]]:
        """The op's floating arguments, drawn in float32; every tensor gets a gradient where a row trains."""
        raise NotImplementedError

    def options(self) -> Arguments:
        """Arguments without a gradient that are made before the clock starts: masks, labels, lengths, flags."""
        return {}

    def torch_options(self, options: Arguments) -> Arguments:
        """The options in the form that plain torch takes."""
        return options

    def ours(self, **arguments: Any) -> Tensor:
        """The op, called with inputs and options."""
        raise NotImplementedError

    def plain(self, *args: Any, **arguments: Any) -> Tensor:
        """The formula in plain PyTorch, with the same names: the oracle in float64, a contender under torch.compile."""
        raise NotImplementedError

    def baseline(self, *args: Any, **arguments: Any) -> Tensor:
        """The best that eager torch has for the result, where that is not `plain`."""
        return self.plain(*args, **arguments)

    def others(self, device: str) -> dict[str, Callable[..., Tensor]]:
        """What else there is for the same result, by name; called as `plain` is."""
        return {}

    def compiling(self, device: str) -> dict[str, Callable[..., Tensor]]:
        """As others, but the first call compiles for seconds."""
        return {}

    def flops(self) -> float:
        """Of the forward."""
        raise NotImplementedError

    def outputs(self) -> int:
        """How many elements the forward writes."""
        raise NotImplementedError

    def bytes(self, training: bool, itemsize: int) -> float:
        """The least traffic. Forward: floating arguments read, outputs written. The backward: arguments and the
        outputs' gradient read, a gradient written for every input, and what forward kept for it."""
        with torch.device("meta"):
            inputs, fixed = (_elements(given) for given in (self.inputs(), self.options()))
        if training:
            return itemsize * float(3 * inputs + 2 * fixed + (2 + self.kept) * self.outputs())
        return itemsize * float(inputs + fixed + self.outputs())

    def length_field(self) -> str | None:
        """The name of the field that time is plotted against: a size, or sizes whose sum it is."""
        there = {f.name for f in fields(self)}
        return next((name for name in LENGTHS if name in there), None)

    def total_length(self) -> float:
        """The number of keys, tokens, rows or examples, 0 where no field says."""
        name = self.length_field()
        held = 0 if name is None else getattr(self, name)
        return float(sum(held)) if isinstance(held, tuple) else float(held)

    def series(self) -> str:
        """What is the same for workloads that differ in their length alone."""
        length = self.length_field()
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in (length, "quick"))

    def problem(self, training: bool, dtype: torch.dtype) -> Problem:
        """The workload on the default device, as the engine takes it."""
        leaves: list[Tensor] = []
        names: list[str] = []
        places: dict[str, int | slice] = {}  # of an argument among the leaves
        for name, given in self.inputs().items():
            one = isinstance(given, Tensor)
            tensors: Sequence[Tensor] = [given] if isinstance(given, Tensor) else given
            start = len(leaves)
            leaves += [t.to(t.dtype if name in self.any_dtype else dtype).requires_grad_(training) for t in tensors]
            names += [name] if one else [f"{name}[{i}]" for i in range(len(tensors))]
            places[name] = start if one else slice(start, len(leaves))
        options = _in_dtype(self.options(), dtype)
        of_torch = self.torch_options(options)
        of_leaves = partial(_of_leaves, places=places, options=of_torch, dtype=dtype)
        as_it_is = type(self).baseline is Workload.baseline
        plain, device = of_leaves(self.plain), torch.get_default_device().type
        return Problem(
            leaves=tuple(leaves),
            names=tuple(names),
            ours=_of_leaves(self.ours, places, options, dtype),
            torch=plain if as_it_is else of_leaves(self.baseline),
            eager=plain,
            others={name: of_leaves(other) for name, other in self.others(device).items()},
            compiling={name: of_leaves(other) for name, other in self.compiling(device).items()},
            provided=lambda run: of_leaves(partial(run, self)),
            fixed=tuple(t for given in (options, of_torch) for t in given.values() if isinstance(t, Tensor)),
        )


def _elements(arguments: Arguments) -> int:
    """Of all floating tensors."""
    given = [t for value in arguments.values() for t in (value if isinstance(value, (list, tuple)) else [value])]
    return sum(t.numel() for t in given if isinstance(t, Tensor) and t.is_floating_point())


def _in_dtype(options: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in options.items()}


def _of_leaves(
    function: Callable[..., Tensor], places: Mapping[str, int | slice], options: Arguments, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """`function` of named arguments as one of the leaves alone; the oracle's are in another dtype."""

    def call(*leaves: Tensor) -> Tensor:
        same = options if leaves[0].dtype == dtype else _in_dtype(options, leaves[0].dtype)
        return function(**{name: leaves[place] for name, place in places.items()}, **same)

    return call


@dataclass(frozen=True)
class Suite:
    """The rows of an op's table: what ours is measured against, in words, and the workloads by the name of their group;
    geometric means are taken over a group."""

    baseline: str
    forward: Mapping[str, Sequence[Workload]]  # under no_grad
    training: Mapping[str, Sequence[Workload]]  # forward and backward

    def cases(self) -> list[Case]:
        return [*self._rows(self.forward, False), *self._rows(self.training, True)]

    @staticmethod
    def _rows(groups: Mapping[str, Sequence[Workload]], training: bool) -> Iterator[Case]:
        for group, workloads in groups.items():
            for work in workloads:
                yield Case(
                    group=group,
                    shape=str(work),
                    note=work.note,
                    problem=partial(work.problem, training),
                    flops=work.flops() * (1 + work.backward_flops if training else 1),
                    bytes=partial(work.bytes, training),
                    training=training,
                    quick=work.quick,
                    gpu=work.gpu,
                    length=work.total_length(),
                    series=work.series(),
                )


def benchmarks_dir() -> Path:
    """The ``benchmarks`` folder of the checkout that this package runs from, or else of the current directory."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks").is_dir():
            return root / "benchmarks"
    raise FileNotFoundError("no benchmarks/ folder: run from a checkout of the project")


def available_ops(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def load(folder: Path, op: str) -> Suite:
    """The suite that ``<folder>/<op>.py`` declares."""
    name = f"_mmkernels_benchmark_{op}"
    spec = importlib.util.spec_from_file_location(name, folder / f"{op}.py")
    if spec is None or spec.loader is None or not (folder / f"{op}.py").is_file():
        raise ValueError(f"bench: no benchmark named {op!r}; available: {', '.join(available_ops(folder))}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    spec.loader.exec_module(module)
    suite: Suite = module.SUITE
    return suite
