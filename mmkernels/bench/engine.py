"""Check a case, then time it: a wrong result gets no number."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from .case import Case, Problem
from .timing import Clock, interleaved

Run = Callable[[], tuple[Tensor, ...]]

HEAD_START = 0.1  # of the budget

# A baseline is not held to the precision rule, only to computing the same thing.
BASELINE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass
class Row:
    """One measured line. `seconds` maps "ours", "torch" and "compiled" to a time; a gap is explained in `missing`."""

    op: str
    group: str
    shape: str
    note: str
    dtype: str
    flops: float
    bytes: float
    peak: float  # FLOP/s of the GEMM that `fraction` refers to
    seconds: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    backend: str = ""  # that served ours

    @property
    def gflops(self) -> float:
        return self.flops / self.seconds["ours"] / 1e9

    @property
    def gbytes(self) -> float:
        return self.bytes / self.seconds["ours"] / 1e9

    @property
    def fraction(self) -> float:
        return self.flops / self.seconds["ours"] / self.peak

    def speedup(self, baseline: str) -> float | None:
        """How many times faster than the baseline, None where either was not timed."""
        if "ours" not in self.seconds or baseline not in self.seconds:
            return None
        return self.seconds[baseline] / self.seconds["ours"]

    def as_json(self) -> dict[str, object]:
        derived: dict[str, object] = {}
        if "ours" in self.seconds:
            derived = {"gflops": self.gflops, "gbytes": self.gbytes, "fraction_of_gemm": self.fraction}
            derived |= {f"speedup_over_{name}": self.speedup(name) for name in ("torch", "compiled")}
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


def check(problem: Problem, grad_out: Tensor | None) -> None:
    """Raise AssertionError unless ours obeys the precision rule, gradients included, and the baseline agrees."""
    from mmkernels.testing import assert_close_to_oracle

    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in problem.leaves]
    wide_grad = None if grad_out is None else grad_out.double()
    names = ("output", *(f"gradient of {name}" for name in problem.names))
    oracle = as_run(problem.eager, wide, wide_grad)()
    plain = as_run(problem.eager, problem.leaves, grad_out)()
    ours = as_run(problem.ours, problem.leaves, grad_out)()
    baseline = as_run(problem.torch, problem.leaves, grad_out)()
    for name, got, same_dtype, exact, other in zip(names, ours, plain, oracle, baseline, strict=False):
        assert_close_to_oracle(got, same_dtype, exact, name=name)
        distance = ((other.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        if not distance <= BASELINE_TOLERANCE[got.dtype]:
            raise AssertionError(f"the baseline computes something else: {name} differs by {distance:.1e}")


def serving_backend(problem: Problem) -> str:
    """The backend that ours runs on; "none" where it calls no op of the package."""
    from mmkernels import explain

    try:
        return explain(problem.ours, *problem.leaves).backend
    except ValueError:
        return "none"


class Engine:
    """Runs cases under one time budget.

    Compiling is the dear part (seconds a row), so a row is compiled only while the run is on schedule: before the n-th
    of N rows at most n/N of `budget` may be gone, a little more at the start, where the first compilation builds what
    the others share. torch keeps compiled code on disk, so a second run fills gaps. `budget=None` compiles every row.
    """

    def __init__(
        self, *, now: Clock, peaks: dict[torch.dtype, float], row_seconds: float, compile: bool, budget: float | None
    ) -> None:
        self.now, self.peaks, self.row_seconds = now, peaks, row_seconds
        self.compile, self.budget = compile, budget
        self.start = time.perf_counter()

    def on_schedule(self, progress: float) -> bool:
        allowed = HEAD_START + (1 - HEAD_START) * progress
        return self.budget is None or time.perf_counter() - self.start <= allowed * self.budget

    def measure(self, op: str, case: Case, dtype: torch.dtype, progress: float = 1.0) -> Row:
        """Check and time one case; `progress` in (0, 1] is the share of the run that this row completes."""
        row = Row(
            op=op,
            group=case.group,
            shape=case.shape,
            note=case.note,
            dtype=str(dtype).removeprefix("torch."),
            flops=case.flops,
            bytes=case.bytes(dtype.itemsize),
            peak=self.peaks[dtype],
        )
        try:
            self._fill(row, case, dtype, progress)
        except (AssertionError, RuntimeError) as wrong:  # a wrong result, or an op that fails: the other rows go on
            row.seconds, row.error = {}, f"{type(wrong).__name__}: {wrong}".splitlines()[0]
        return row

    def _fill(self, row: Row, case: Case, dtype: torch.dtype, progress: float) -> None:
        torch.manual_seed(0)  # a row's inputs do not depend on which rows ran before it
        problem = case.problem(dtype)
        grad_out = None
        if case.training:
            with torch.no_grad():
                grad_out = torch.randn_like(problem.torch(*problem.leaves))
        check(problem, grad_out)
        row.backend = serving_backend(problem)
        contenders = {
            "ours": as_run(problem.ours, problem.leaves, grad_out),
            "torch": as_run(problem.torch, problem.leaves, grad_out),
        }
        if not self.compile:
            row.missing["compiled"] = "not asked for"
        elif not self.on_schedule(progress):
            row.missing["compiled"] = "no time left in the budget"
        else:
            try:
                contenders["compiled"] = self.compiled(problem, grad_out)
            except Exception as failure:  # no C++ compiler, an unsupported graph: a gap in the column, not the end
                row.missing["compiled"] = f"failed: {type(failure).__name__}"
        row.seconds = interleaved(contenders, self.now, self.row_seconds, 3 if self.on_schedule(progress) else 1)

    @staticmethod
    def compiled(problem: Problem, grad_out: Tensor | None) -> Run:
        """The plain formula under torch.compile, compiled here by its first call."""
        torch._dynamo.reset()  # each shape gets its own static code, never a cached dynamic one
        run = as_run(torch.compile(problem.eager, dynamic=False), problem.leaves, grad_out)
        run()
        return run
