"""A benchmark small enough to run whole in a test, on a machine whose ceilings are measured in no time."""

from __future__ import annotations

import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from mmkernels.bench import machine, main, suite
from mmkernels.bench.timing import gemm_rate, memory_rates

TOY_BENCHMARK = """
    from dataclasses import dataclass
    import torch
    from mmkernels.bench import Suite, Workload

    @dataclass(frozen=True)
    class Shape(Workload):
        n: int

        def __str__(self):
            return f"{self.n}x{self.n}"

        def inputs(self):
            return {"ab": [torch.randn(self.n, self.n) for _ in range(2)], "c": torch.randn(self.n, self.n)}

        def ours(self, ab, c):
            return ab[0] @ ab[1] + c

        def plain(self, ab, c):
            return ab[0] @ ab[1] + c

        def baseline(self, ab, c):
            return torch.addmm(c, *ab)

        def flops(self):
            return 2.0 * self.n**3

        def outputs(self):
            return self.n**2

    SMALL = (Shape("toy", 6, quick=True),)
    SUITE = Suite("torch.addmm", {"forward": SMALL, "long": [Shape("toy", 7)]}, {"training": SMALL})
"""


def toy_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `benchmarks` folder with the toy alone, which is the one that the benchmark finds."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "toy.py").write_text(textwrap.dedent(TOY_BENCHMARK))
    monkeypatch.setattr(suite, "benchmarks_dir", lambda: folder)
    monkeypatch.setattr(main, "ROW_SECONDS", 0.02)
    monkeypatch.setattr(machine, "gemm_rate", partial(gemm_rate, n=64, budget=0.01))
    monkeypatch.setattr(machine, "memory_rates", partial(memory_rates, sizes=(1 << 16, 1 << 20), budget=0.01))
    return folder


def false_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.perf_counter` tells: a millisecond for each look at it, and what a test adds."""
    told = [0.0]

    def look() -> float:
        told[0] += 1e-3
        return told[0]

    monkeypatch.setattr(time, "perf_counter", look)
    return told


def run(folder: Path, *options: str) -> int:
    """The benchmark's exit status; it writes to `results` beside the folder."""
    pytest.importorskip("tqdm")
    return main.main([*options, "--output", str(folder.parent / "results")])
