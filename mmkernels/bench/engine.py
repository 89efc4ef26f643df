"""Check a case, then time it: a wrong result gets no number."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from . import memory
from .case import Case, Problem
from .machine import Ceilings
from .plugin import Provider
from .providers import ours_elsewhere
from .timing import Clock, clock, in_rounds, interleaved, lower_quartiles, percentile

Run = Callable[[], tuple[Tensor, ...]]

# Shares of the budget. Of what is not for compiling, a row's share pays for its check first, which may run plain
# bfloat16 at a hundredth of ours' speed, so that only a part of it is promised to the timing.
COMPILING, TIMING = 0.35, 0.4
SHORTEST = 0.05  # seconds of timing that every row gets
LATENCY_CALLS = 100  # the least whose 99th percentile is one of them
PERCENTILES = (50, 90, 99)
SLOW = 1.0  # seconds of a call that the check has timed well enough, where a row has no more time

# A baseline is not held to the precision rule, only to computing the same thing.
BASELINE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Row:
    """One measured line. `seconds` maps "ours", "torch", "compiled" and what others the case has to a time; a gap is
    explained in `missing`."""

    op: str
    group: str
    shape: str
    note: str
    dtype: str
    flops: float
    bytes: float
    peak: float  # FLOP/s of a plain matrix product
    bound: float  # seconds that it takes at least: `Ceilings.bound`
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    backend: str = ""  # that served ours
    threads: int = 0  # 0: as many as the run says
    length: float = 0.0  # `Workload.total_length`
    series: str = ""  # `Workload.series`
    training: bool = False
    latency: dict[str, dict[str, float | None]] = field(default_factory=dict)  # seconds by contender and percentile
    memory: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes: "peak" and, where it trains, "kept"

    @property
    def setting(self) -> str:
        """The dtype, and the threads where a run has several numbers of them."""
        return self.dtype + (f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "")

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds["ours"] / 1e9

    @property
    def gbytes(self) -> float:
        return self.bytes / self.seconds["ours"] / 1e9

    @property
    def fraction(self) -> float:
        """Of the bound; over 1 where data stays in a nearer cache than a copy of as many bytes."""
        return self.bound / self.seconds["ours"]

    def speedup(self, baseline: str) -> float | None:
        """How many times faster than the baseline, None where either was not timed."""
        if "ours" not in self.seconds or baseline not in self.seconds:
            return None
        return self.seconds[baseline] / self.seconds["ours"]

    @property
    def others(self) -> list[str]:
        """The contenders beside torch's plain and compiled ones."""
        names = (*self.seconds, *self.missing)
        return [n for n in dict.fromkeys(names) if n not in ("ours", "torch", "compiled")]

    def as_json(self) -> dict[str, object]:
        derived: dict[str, object] = {}
        if "ours" in self.seconds:
            derived = {"gflops": self.gflops, "gbytes": self.gbytes, "fraction_of_bound": self.fraction}
            names = ("torch", "compiled", *self.others)
            derived |= {f"speedup_over_{name}": self.speedup(name) for name in names}
        return asdict(self) | derived


def as_run(fn: Callable[..., Tensor], leaves: Sequence[Tensor], grad_out: Tensor | None) -> Run:
    """The timed call: forward under no_grad, or with `grad_out` forward and the gradient of every leaf."""
    if grad_out is None:

        @torch.no_grad()
        def forward() -> tuple[Tensor, ...]:
            return (fn(*leaves),)

        return forward

    def training() -> tuple[Tensor, ...]:
        out = fn(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    return training


def check(problem: Problem, grad_out: Tensor | None, now: Clock = time.perf_counter) -> dict[str, float]:
    """Raise AssertionError unless ours obeys the precision rule, gradients included, and the baseline agrees.

    Returns the seconds of its only call of ours and of torch: too cold to report where calls are short.
    """
    from mmkernels.testing import assert_close_to_oracle

    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in problem.leaves]
    wide_grad = None if grad_out is None else grad_out.double()
    names = ("output", *(f"gradient of {name}" for name in problem.names))
    same = problem.torch is problem.eager
    oracle = as_run(problem.eager, wide, wide_grad)()
    ticks = [now()]
    ours = as_run(problem.ours, problem.leaves, grad_out)()
    ticks.append(now())
    baseline = as_run(problem.torch, problem.leaves, grad_out)()
    ticks.append(now())
    plain = baseline if same else as_run(problem.eager, problem.leaves, grad_out)()
    for name, got, same_dtype, exact, other in zip(names, ours, plain, oracle, baseline, strict=False):
        assert_close_to_oracle(got, same_dtype, exact, name=name)
        if same:
            continue
        distance = ((other.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        if not distance <= BASELINE_TOLERANCE[got.dtype]:
            raise AssertionError(f"the baseline computes something else: {name} differs by {distance:.1e}")
    return {"ours": ticks[1] - ticks[0], "torch": ticks[2] - ticks[1]}


def disagreement(run: Run, expected: tuple[Tensor, ...]) -> str | None:
    """How a provider's result differs from the baseline's; None where it is the same up to rounding."""
    for i, (got, wanted) in enumerate(zip(run(), expected, strict=True)):
        what = f"gradient {i - 1}" if i else "output"
        if got.shape != wanted.shape:
            return f"{what} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
        distance = ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()
        if not distance <= 2 * BASELINE_TOLERANCE[wanted.dtype]:
            return f"{what} differs by {distance:.1e}"
    return None


def within(context: Callable[[], AbstractContextManager[object]], run: Run) -> Run:
    """The call inside of a context, its backward as well."""

    def inside() -> tuple[Tensor, ...]:
        with context():
            return run()

    return inside


def serving_backend(problem: Problem) -> str:
    """The backend that ours runs on; "none" where it calls no op of the package."""
    from mmkernels import explain

    try:
        return explain(problem.ours, *problem.leaves).backend
    except ValueError:
        return "none"


def on_triton(ours: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
    """Ours on its Triton kernels, where its CUDA kernels come first."""
    from mmkernels import use_backend

    with use_backend("triton"):
        return ours(*leaves)


class Engine:
    """Runs rows under one time budget, in the order in which they are given.

    Compiling is the dear part (seconds a row): the first rows are compiled, until COMPILING of the budget is spent on
    it. The rest belongs to the rows alike: of what is left of it, divided by the rows to come, TIMING is how long a row
    is timed, at least SHORTEST, at most `row_seconds`. `budget=None` compiles every row and times it for `row_seconds`;
    0 compiles none and times each briefly. `left` says whether another row should begin.
    """

    def __init__(
        self,
        *,
        now: Clock,
        ceilings: Ceilings,
        row_seconds: float,
        compile: bool,
        budget: float | None,
        start: float | None = None,
        device: str = "cpu",
        calls: int = 1,
        names: frozenset[str] | None = None,
        providers: Mapping[str, Provider] = MappingProxyType({}),
        latency: bool = False,
        memory: bool = False,
    ) -> None:
        self.now, self.ceilings, self.row_seconds, self.device, self.calls = now, ceilings, row_seconds, device, calls
        self.names, self.providers, self.latency, self.memory = names, providers, latency, memory
        self.budget = float("inf") if budget is None else budget
        self.start = time.perf_counter() if start is None else start
        self.compile = compile
        self.for_compiling = COMPILING * self.budget if compile else 0.0  # seconds left of that share

    def competes(self, name: str) -> bool:
        """Whether a contender was asked for."""
        return self.names is None or name in self.names

    def timing_seconds(self, rows_left: int) -> float:
        """How long to time a row that is followed by `rows_left` - 1 others."""
        if self.budget == float("inf"):
            return self.row_seconds
        left = self.budget - (time.perf_counter() - self.start) - max(self.for_compiling, 0.0)
        return min(max(TIMING * left / rows_left, SHORTEST), self.row_seconds)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self.start)

    def measure(self, op: str, case: Case, dtype: torch.dtype, rows_left: int = 1) -> Row:
        """Check and time one case, which is followed by `rows_left` - 1 others."""
        name, moved = str(dtype).removeprefix("torch."), case.bytes(dtype.itemsize)
        row = Row(
            op=op,
            group=case.group,
            shape=case.shape,
            note=case.note,
            dtype=name,
            flops=case.flops,
            bytes=moved,
            peak=self.ceilings.gemm[name],
            bound=self.ceilings.bound(case.flops, moved, name),
            length=case.length,
            series=case.series,
            training=case.training,
        )
        try:
            self._fill(row, case, dtype, rows_left)
        # A wrong result, an op that fails, or sizes that it does not take: the other rows go on.
        except (AssertionError, RuntimeError, ValueError) as wrong:
            row.seconds, row.error = {}, f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        return row

    def _fill(self, row: Row, case: Case, dtype: torch.dtype, rows_left: int) -> None:
        torch.manual_seed(0)  # a row's inputs do not depend on which rows ran before it
        with torch.device(self.device):  # the cases' tensors name none
            problem = case.problem(dtype)
            grad_out = None
            if case.training:
                with torch.no_grad():
                    grad_out = torch.randn_like(problem.ours(*problem.leaves))
            once = check(problem, grad_out, self.now)
        row.backend = serving_backend(problem)
        contenders = {"ours": as_run(problem.ours, problem.leaves, grad_out)}
        if self.competes("torch"):
            contenders["torch"] = as_run(problem.torch, problem.leaves, grad_out)
        others = {name: other for name, other in problem.others.items() if self.competes(name)}
        if row.backend == "cuda" and self.competes("triton"):
            others["triton"] = partial(on_triton, problem.ours)
        for name, other in others.items():
            self._add(contenders, row, name, partial(as_run, other, problem.leaves, grad_out))
        self._add_providers(contenders, row, problem, grad_out)
        for name, make in self._compiling(problem, grad_out).items():
            if not self.compile:
                row.missing[name] = "not asked for"
            elif self.for_compiling <= 0:
                row.missing[name] = "its share of the budget is spent"
            else:
                begin = time.perf_counter()
                self._add(contenders, row, name, make)
                self.for_compiling -= time.perf_counter() - begin
        seconds = self.timing_seconds(rows_left)
        # On a GPU the first call also compiled ours.
        slow = {
            name: taken
            for name, taken in once.items()
            if name in contenders and self.device == "cpu" and taken > max(seconds, SLOW)
        }
        quick = {name: run for name, run in contenders.items() if name not in slow}
        if self.memory:
            self._measure_memory(row, problem, grad_out, {n: r for n, r in quick.items() if n in ("ours", "torch")})
        if self.latency:
            self._measure_latency(row, quick, seconds, sum(once[name] for name in quick if name in once))
            row.seconds |= slow
        else:
            row.seconds = interleaved(quick, self.now, seconds, min_rounds=1, calls=self.calls) | slow

    def _compiling(self, problem: Problem, grad_out: Tensor | None) -> dict[str, Callable[[], Run]]:
        """The contenders whose first call compiles."""
        made: dict[str, Callable[[], Run]] = {"compiled": partial(self.compiled, problem, grad_out)}
        made |= {name: partial(as_run, f, problem.leaves, grad_out) for name, f in problem.compiling.items()}
        for name in sorted(self.names or ()):
            if name.startswith("compiled@"):
                made[name] = partial(self.compiled, problem, grad_out, name.partition("@")[2])
        return {name: make for name, make in made.items() if self.competes(name)}

    def _add_providers(self, contenders: dict[str, Run], row: Row, problem: Problem, grad_out: Tensor | None) -> None:
        """What was asked for beside the benchmark's own contenders; a wrong result leaves a gap."""
        made: dict[str, Run] = {}
        for name, provider in self.providers.items():
            if self.competes(name) and provider.serves(row.op) and problem.provided is not None:
                made[name] = as_run(problem.provided(provider.run), problem.leaves, grad_out)
        for name, context in ours_elsewhere(self.device).items() if self.names else ():
            if self.competes(name):
                made[name] = within(context, as_run(problem.ours, problem.leaves, grad_out))
        if not made:
            return
        expected = as_run(problem.torch, problem.leaves, grad_out)()
        for name, run in made.items():
            self._add(contenders, row, name, partial(lambda run: run, run))
            if name in contenders and (wrong := disagreement(run, expected)) is not None:
                del contenders[name]
                row.missing[name] = f"computes something else: {wrong}"

    def _measure_latency(self, row: Row, contenders: Mapping[str, Run], seconds: float, once: float) -> None:
        """Single calls on the wall clock, 100 of each unless those are too many for the row."""
        rounds = max(1, min(LATENCY_CALLS, int(max(seconds, SLOW) / max(once, 1e-9))))
        samples = in_rounds(contenders, clock(0, self.device), seconds, min_rounds=rounds)
        row.latency = {
            name: {f"p{percent}": percentile(taken, percent) for percent in PERCENTILES}
            for name, taken in samples.items()
        }
        row.seconds = lower_quartiles(samples)

    def _measure_memory(
        self, row: Row, problem: Problem, grad_out: Tensor | None, contenders: Mapping[str, Run]
    ) -> None:
        functions = {"ours": problem.ours, "torch": problem.torch}
        for name, run in contenders.items():
            row.memory[name] = {"peak": memory.peak(run, self.device)}
            if grad_out is not None:
                forward = partial(functions[name], *problem.leaves)
                row.memory[name]["kept"] = memory.kept(forward, (*problem.leaves, *problem.fixed))

    @staticmethod
    def _add(contenders: dict[str, Run], row: Row, name: str, make: Callable[[], Run]) -> None:
        """One contender more, called once; where it fails (it cannot serve such a case, say), a gap in its column."""
        try:
            run = make()
            run()
        except Exception as failure:
            row.missing[name] = f"failed: {type(failure).__name__}"
        else:
            contenders[name] = run

    @staticmethod
    def compiled(problem: Problem, grad_out: Tensor | None, backend: str = "inductor") -> Run:
        """The plain formula under torch.compile; its first call compiles."""
        torch._dynamo.reset()  # each shape gets its own static code, never a cached dynamic one
        return as_run(torch.compile(problem.eager, dynamic=False, backend=backend), problem.leaves, grad_out)
