"""The benchmark engine: it times what is right, refuses what is wrong, and reports both."""

from __future__ import annotations

import json
import runpy
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmkernels.bench import Case, Problem, main, report
from mmkernels.bench.case import available_ops, load
from mmkernels.bench.engine import Engine, Row, check
from mmkernels.bench.timing import clock, gemm_rate, interleaved

ROOT = Path(__file__).resolve().parents[1]

TOY_BENCHMARK = """
    import torch
    from mmkernels.bench import Case, Problem

    BASELINE = "torch.addmm"

    def problem(dtype):
        a, b, c = (torch.randn(6, 6).to(dtype).requires_grad_() for _ in range(3))
        product = lambda a, b, c: a @ b + c
        return Problem((a, b, c), ("a", "b", "c"), product, lambda a, b, c: torch.addmm(c, a, b), product)

    def cases():
        shared = dict(shape="6x6", note="toy", problem=problem, flops=432.0, bytes=lambda size: 4.0 * 36 * size)
        return [
            Case(group="forward", quick=True, **shared),
            Case(group="training", training=True, quick=True, **shared),
            Case(group="long", **shared),
        ]
"""


def case(ours: Callable[..., Tensor], *, training: bool = False) -> Case:
    """A product of two matrices, computed by `ours`."""

    def problem(dtype: torch.dtype) -> Problem:
        leaves = tuple(torch.randn(8, 8).to(dtype).requires_grad_(training) for _ in range(2))
        return Problem(leaves, ("a", "b"), ours, torch.matmul, torch.matmul)

    return Case("forward", "8x8", "toy", problem, flops=1024.0, bytes=lambda size: 192.0 * size, training=training)


def engine(**changes: object) -> Engine:
    settings = {
        "peaks": {torch.float32: 1e9, torch.bfloat16: 1e9},
        "row_seconds": 0.01,
        "compile": False,
        "budget": None,
    }
    return Engine(now=clock(1), **(settings | changes))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        return grad @ b.T, 1.01 * a.T @ grad


@pytest.fixture
def toy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "toy.py").write_text(textwrap.dedent(TOY_BENCHMARK))
    monkeypatch.setattr(main, "benchmarks_dir", lambda: folder)
    monkeypatch.setattr(main, "gemm_rate", partial(gemm_rate, n=64, budget=0.01))
    return folder


def run(folder: Path, *options: str) -> int:
    pytest.importorskip("tqdm")
    return main.main([*options, "--output", str(folder.parent / "results")])


def test_a_run_leaves_table_json_and_plot(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run(toy_folder, "--quick") == 0
    printed = capsys.readouterr().out
    for expected in ("toy, float32", "toy, bfloat16", "training", "torch.addmm", "0 wrong"):
        assert expected in printed
    results = toy_folder.parent / "results"
    latest = json.loads((results / "latest.json").read_text())
    rows = latest["ops"]["toy"]["rows"]
    assert [(row["group"], row["dtype"]) for row in rows] == [
        (group, dtype) for dtype in ("float32", "bfloat16") for group in ("forward", "training")
    ]
    assert all(row["seconds"]["ours"] > 0 and row["speedup_over_torch"] > 0 for row in rows)
    assert latest["machine"]["machine"]["cpu"] and set(latest["gemm_gflops"]) == {"float32", "bfloat16"}
    (plot,) = results.glob("toy-*.png")
    assert plot.with_suffix(".json").is_file()


def test_options_choose_rows_and_unknown_names_are_refused(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(toy_folder, "--shapes", "long", "--dtypes", "float16", "--no-compile", "--budget", "0.1") == 0
    (row,) = json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]["toy"]["rows"]
    assert (row["group"], row["dtype"]) == ("long", "float16")
    with pytest.raises(SystemExit, match="no row matches"):
        run(toy_folder, "--shapes", "no such shape")
    with pytest.raises(ValueError, match="no benchmark named 'nothing'; available: toy"):
        run(toy_folder, "--ops", "nothing")
    with pytest.raises(SystemExit):
        run(toy_folder, "--dtypes", "int8")
    assert "expected float32, bfloat16, float16, got int8" in capsys.readouterr().err


def test_the_number_of_threads_is_restored(toy_folder: Path) -> None:
    before = torch.get_num_threads()
    run(toy_folder, "--quick", "--threads", str(before + 1))
    assert torch.get_num_threads() == before


def test_a_wrong_result_is_not_timed(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = engine().measure("toy", case(lambda a, b: (a @ b) * 1.01), torch.float32)
    assert row.seconds == {} and row.error is not None and "output" in row.error
    assert "WRONG, not timed" in report.text_table([row], {"toy": "torch"})
    benchmark = toy_folder / "toy.py"
    benchmark.write_text(benchmark.read_text().replace('("a", "b", "c"), product,', '("a", "b", "c"), torch.addmm,'))
    assert run(toy_folder, "--quick") == 1
    assert "WRONG, not timed" in capsys.readouterr().out


def test_a_wrong_gradient_is_not_timed() -> None:
    row = engine().measure("toy", case(WrongGradient.apply, training=True), torch.float32)
    assert row.seconds == {} and row.error is not None and "gradient of b" in row.error


def test_an_op_that_fails_is_reported_and_ends_nothing() -> None:
    def fails(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    row = engine().measure("toy", case(fails), torch.float32)
    assert row.seconds == {} and row.error == "RuntimeError: no such kernel"


def test_an_unequal_baseline_is_not_timed_against() -> None:
    good = case(torch.matmul)
    unequal = replace(good, problem=lambda dtype: replace(good.problem(dtype), torch=torch.add))
    row = engine().measure("toy", unequal, torch.float32)
    assert row.seconds == {} and row.error is not None and "baseline computes something else" in row.error


def test_rows_behind_schedule_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(problem: Problem, grad_out: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (problem.eager(*problem.leaves),)

    monkeypatch.setattr(Engine, "compiled", staticmethod(compiled))
    late = engine(compile=True, budget=1.0)
    late.start = time.perf_counter() - 0.5
    skipped = late.measure("toy", case(torch.matmul), torch.float32, progress=0.1)
    assert skipped.missing == {"compiled": "no time left in the budget"} and "torch" in skipped.seconds
    assert "compiled" in late.measure("toy", case(torch.matmul), torch.float32, progress=1.0).seconds


def test_a_failing_compilation_leaves_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem, grad_out: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Engine, "compiled", staticmethod(broken))
    row = engine(compile=True).measure("toy", case(torch.matmul), torch.float32)
    assert row.missing == {"compiled": "failed: RuntimeError"} and row.speedup("torch") is not None
    assert report.gaps([row]) == ["compiled: failed: RuntimeError (1 of 1 rows)"]


def test_times_are_lower_quartiles_of_interleaved_calls() -> None:
    order: list[str] = []
    ticks = iter(float(t) for t in [0, 5, 5, 6, 10, 11, 11, 13, 20, 22, 22, 25, 30, 39, 39, 43])
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, lambda: next(ticks), 0.0, 4)
    assert order == ["a", "b"] * 4
    assert times == {"a": 2.0, "b": 2.0}  # second smallest of a: 5 1 2 9, b: 1 2 3 4


def test_the_readme_table_is_replaced_between_its_markers(tmp_path: Path) -> None:
    row = Row("toy", "forward", "8x8", "toy", "float32", 2e9, 1e6, 2e11, {"ours": 0.01, "torch": 0.02})
    machine = {
        "machine": {"cpu": "A CPU", "threads": 1},
        "native": {"reason": None, "isa": "avx2"},
        "versions": {"torch": "2.13"},
    }
    when = main.datetime(2030, 1, 2)
    table = report.markdown_table([row], {"toy": "torch SDPA"}, machine, {"float32": 2e11}, when)
    assert "A CPU" in table and "**2.00x**" in table and "| 200 | 100% |" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.README_BEGIN}\nold\n{report.README_END}\nafter\n")
    report.update_readme(readme, table)
    once = readme.read_text()
    assert "old" not in once and once.startswith("before\n") and once.endswith("\nafter\n") and table in once
    report.update_readme(readme, table)
    assert readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected one"):
        report.update_readme(readme, table)
    assert (ROOT / "README.md").read_text().count(report.README_BEGIN) == 1


@pytest.mark.parametrize("op", available_ops(ROOT / "benchmarks"))
def test_quick_rows_of_every_benchmark_pass_their_check(op: str) -> None:
    for one in load(ROOT / "benchmarks", op).cases():
        assert one.flops >= 0 and one.bytes(4) == 2 * one.bytes(2) > 0
        if one.quick:
            problem = one.problem(torch.float32)
            grad_out = torch.randn_like(problem.ours(*problem.leaves)) if one.training else None
            check(problem, grad_out)


def test_the_photo_example_agrees_and_shows_where_words_look(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    example = runpy.run_path(str(ROOT / "examples" / "photo_text.py"))
    assert example["main"]() == 0
    printed = capsys.readouterr().out
    for expected in ("china.jpg", "flower.jpg", "all that 'temple' looks at", "same output: yes"):
        assert expected in printed
