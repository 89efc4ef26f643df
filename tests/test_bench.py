"""The benchmark engine: it times what is right, refuses what is wrong, and reports both."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from bench_toys import false_clock, run, toy_benchmarks
from environment import DEVICE
from torch import Tensor

from mmkernels.bench import Workload, main, report
from mmkernels.bench.case import Case, Problem
from mmkernels.bench.engine import COMPILING, SHORTEST, TIMING, Engine, Row, check
from mmkernels.bench.machine import Ceilings
from mmkernels.bench.suite import available_ops, load
from mmkernels.bench.timing import clock, interleaved, memory_rates

ROOT = Path(__file__).resolve().parents[1]


def case(ours: Callable[..., Tensor], *, training: bool = False) -> Case:
    """A product of two matrices, computed by `ours`."""

    def problem(dtype: torch.dtype) -> Problem:
        leaves = tuple(torch.randn(8, 8).to(dtype).requires_grad_(training) for _ in range(2))
        return Problem(leaves, ("a", "b"), ours, torch.matmul, torch.matmul)

    return Case("forward", "8x8", "toy", problem, flops=1024.0, bytes=lambda size: 192.0 * size, training=training)


def engine(**changes: object) -> Engine:
    settings = {
        "ceilings": Ceilings({"float32": 1e9, "bfloat16": 1e9}, {1 << 20: 1e9}),
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
    return toy_benchmarks(tmp_path, monkeypatch)


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
    assert all(rate > 0 for rate in latest["memory_gbytes"].values()) and len(latest["memory_gbytes"]) == 2
    assert all(row["fraction_of_bound"] == row["bound"] / row["seconds"]["ours"] > 0 for row in rows)
    (plot,) = results.glob("toy-*.png")
    assert plot.with_suffix(".json").is_file()


def test_options_choose_rows(toy_folder: Path) -> None:
    assert run(toy_folder, "--workload", "LONG", "--dtypes", "float16", "--no-compile", "--budget", "0.1") == 0
    (row,) = json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]["toy"]["rows"]
    assert (row["group"], row["dtype"]) == ("long", "float16")


def test_the_number_of_threads_is_restored(toy_folder: Path) -> None:
    before = torch.get_num_threads()
    run(toy_folder, "--quick", "--threads", str(before + 1))
    assert torch.get_num_threads() == before


def test_a_wrong_result_is_not_timed(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = engine().measure("toy", case(lambda a, b: (a @ b) * 1.01), torch.float32)
    assert row.seconds == {} and row.error is not None and "output" in row.error
    assert "WRONG, not timed" in report.text_table([row], {"toy": "torch"})
    benchmark = toy_folder / "toy.py"
    benchmark.write_text(benchmark.read_text().replace("ab[0] @ ab[1] + c", "ab[0] @ ab[1] - c", 1))
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


def test_other_contenders_have_a_column_and_those_that_fail_a_gap() -> None:
    def fails(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    good, others = case(torch.matmul), {"mm": torch.mm, "bad": fails}
    contested = replace(
        good, problem=lambda dtype: replace(good.problem(dtype), others=others, compiling={"slow": torch.mm})
    )
    row = engine(calls=2).measure("toy", contested, torch.float32)
    assert row.error is None and row.seconds["mm"] > 0 and row.missing["bad"] == "failed: RuntimeError"
    assert row.missing["slow"] == row.missing["compiled"] == "not asked for"
    assert engine(compile=True).measure("toy", contested, torch.float32).seconds["slow"] > 0
    assert row.as_json()["speedup_over_mm"] == row.seconds["mm"] / row.seconds["ours"]
    assert "x mm" in report.text_table([row], {"toy": "torch"})


def test_rows_for_a_gpu_are_left_out_on_a_cpu(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = toy_folder / "toy.py"
    benchmark.write_text(benchmark.read_text().replace('Shape("toy", 7)', 'Shape("toy", 7, gpu=True)'))
    assert run(toy_folder, "--no-compile", "--report", str(toy_folder / "report.md")) == 0
    assert "4 rows" in capsys.readouterr().out
    assert "| training | 6x6 (toy) | bfloat16 |" in (toy_folder / "report.md").read_text()


def test_first_rows_are_compiled_until_the_share_for_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    told = false_clock(monkeypatch)

    def compiled(problem: Problem, grad_out: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
        told[0] += 1000.0
        return lambda: (problem.eager(*problem.leaves),)

    monkeypatch.setattr(Engine, "compiled", staticmethod(compiled))
    bench = engine(compile=True, budget=1000 * 1.5 / COMPILING)
    rows = [bench.measure("toy", case(torch.matmul), torch.float32, rows_left=3 - i) for i in range(3)]
    assert ["compiled" in row.seconds for row in rows] == [True, True, False]
    assert rows[2].missing == {"compiled": "its share of the budget is spent"} and "torch" in rows[2].seconds
    unlimited, none = engine(compile=True), engine(compile=True, budget=0.0)
    assert "compiled" in unlimited.measure("toy", case(torch.matmul), torch.float32).seconds
    assert "compiled" not in none.measure("toy", case(torch.matmul), torch.float32).seconds


def test_rows_share_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    false_clock(monkeypatch)
    bench = engine(budget=1000.0, row_seconds=100.0)
    assert bench.timing_seconds(100) == pytest.approx(10 * TIMING, rel=0.01)
    assert bench.timing_seconds(1) == 100.0  # no row is timed for longer
    bench.start -= 500.0
    assert bench.timing_seconds(100) == pytest.approx(5 * TIMING, rel=0.01)
    bench.for_compiling = 400.0
    assert bench.timing_seconds(100) == pytest.approx(1 * TIMING, rel=0.01)
    bench.start -= 600.0
    assert bench.timing_seconds(100) == SHORTEST  # late, and yet timed
    assert engine(row_seconds=7.0).timing_seconds(100) == 7.0


def test_ops_dtypes_and_passes_take_turns(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (toy_folder / "other.py").write_text((toy_folder / "toy.py").read_text())
    measured: list[tuple[str, str, str]] = []
    measure = Engine.measure

    def recording(self: Engine, op: str, case: Case, dtype: torch.dtype, rows_left: int) -> Row:
        measured.append((op, str(dtype)[6:], case.group))
        return measure(self, op, case, dtype, rows_left)

    monkeypatch.setattr(Engine, "measure", recording)
    assert run(toy_folder, "--no-compile") == 0
    kinds = [(dtype, group) for dtype in ("float32", "bfloat16") for group in ("forward", "training")]
    kinds += [("float32", "long"), ("bfloat16", "long")]
    assert measured == [(op, *kind) for kind in kinds for op in ("other", "toy")]
    ops = json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]
    assert [row["dtype"] for row in ops["toy"]["rows"]] == ["float32"] * 3 + ["bfloat16"] * 3


def test_a_bound_is_the_slower_of_arithmetic_and_bytes() -> None:
    ceilings = Ceilings({"float32": 1e9, "bfloat16": 2e9}, {1 << 20: 100e9, 1 << 22: 10e9})
    assert ceilings.bound(1e9, 1e3, "float32") == 1.0 and ceilings.bound(1e9, 1e3, "bfloat16") == 0.5
    assert ceilings.bound(0.0, 1e6, "float32") == 1e-5  # fits the nearer working set
    assert ceilings.bound(0.0, 2e6, "float32") == 2e-4
    assert ceilings.bound(0.0, 1e9, "float32") == 0.1  # fits none: the rate of the largest
    for text in ("float32 1 GF/s", "bfloat16 2 GF/s", "1 MiB 100 GB/s", "4 MiB 10 GB/s"):
        assert text in str(ceilings)


def test_the_memory_rate_counts_every_byte_of_the_working_set() -> None:
    ticks = iter(range(1000))
    rates = memory_rates(lambda: next(ticks), sizes=(4096, 8192), budget=0.0)  # every call takes one second
    assert rates == {4096: 4096.0, 8192: 8192.0}


def test_table_shows_bytes_bound_and_the_fraction_reached() -> None:
    row = Row("toy", "forward", "8x8", "toy", "float32", 2e9, 3e6, 2e11, 0.004, {"ours": 0.01, "torch": 0.02})
    heads, _, _, _, line = report.text_table([row], {"toy": "torch"}).splitlines()
    assert heads.split()[2:6] == ["ours", "bound", "of", "bound"] and "MB" in heads.split()
    assert line.split()[2:7] == ["10.0", "4.000", "40%", "3", "20.0"]


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
    row = Row("toy", "forward", "8x8", "toy", "float32", 2e9, 1e6, 2e11, 0.005, {"ours": 0.01, "torch": 0.02})
    row.seconds["flash"] = 0.03
    info = {
        "machine": {"cpu": "A CPU", "threads": 1},
        "native": {"reason": None, "isa": "avx2"},
        "versions": {"torch": "2.13"},
    }
    when = main.datetime(2030, 1, 2)
    ceilings = Ceilings({"float32": 2e11}, {1 << 22: 1e10})
    table = report.markdown_table([row], {"toy": "torch SDPA"}, info, ceilings, when)
    assert "A CPU" in table and "**2.00x**" in table and "4 MiB 10 GB/s" in table
    page = report.markdown_rows([row], {"toy": "torch SDPA"}, info, ceilings, when)
    assert "| 10.0 ms | 5.000 ms | 50% | 1 | 20.0 ms | – | 30.0 ms | 2.00x | - | 3.00x | 200 | 0 |" in page
    assert "A CPU" in page and "| than flash |" in page
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


@dataclass(frozen=True)
class Scaled(Workload):
    """a_0 s + a_1 + t, where s keeps float32, t has no gradient and plain torch takes it negated."""

    any_dtype = ("s",)
    kept = 1

    def inputs(self) -> dict[str, object]:
        return {"a": [torch.randn(4), torch.randn(4)], "s": torch.full((4,), 3.0)}

    def options(self) -> dict[str, object]:
        return {"t": torch.tensor(1 / 3), "mask": torch.ones(4, dtype=torch.bool), "flag": True}

    def torch_options(self, options: Mapping[str, object]) -> dict[str, object]:
        return {"minus": -options["t"]}  # type: ignore[operator]

    def ours(self, a: tuple[Tensor, ...], s: Tensor, t: Tensor, mask: Tensor, flag: bool) -> Tensor:
        assert flag and mask.dtype == torch.bool and a[0].dtype == t.dtype
        return (a[0] * s + a[1] + t).to(a[0].dtype)

    def plain(self, a: tuple[Tensor, ...], s: Tensor, minus: Tensor) -> Tensor:
        return (a[0] * s + a[1] - minus).to(a[0].dtype)

    def outputs(self) -> int:
        return 4


def test_a_workload_gives_leaves_by_name_in_their_dtypes_and_options_follow_the_oracle() -> None:
    problem = Scaled("toy").problem(True, torch.bfloat16)
    assert problem.names == ("a[0]", "a[1]", "s") and problem.torch is problem.eager
    assert [leaf.dtype for leaf in problem.leaves] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert all(leaf.requires_grad for leaf in problem.leaves)
    torch.testing.assert_close(problem.ours(*problem.leaves), problem.eager(*problem.leaves))
    check(problem, torch.ones(4, dtype=torch.bfloat16))
    wide = [leaf.detach().double() for leaf in problem.leaves]
    rounded = torch.tensor(1 / 3, dtype=torch.bfloat16).double()  # as the checked call has it
    assert torch.equal(problem.eager(*wide), wide[0] * wide[2] + wide[1] + rounded)


def test_bytes_count_arguments_outputs_gradients_and_what_is_kept() -> None:
    assert Scaled("toy").bytes(False, 2) == 2 * (12 + 1 + 4)  # inputs, t, output
    assert Scaled("toy").bytes(True, 2) == 2 * (3 * 12 + 2 * 1 + 3 * 4)


def test_the_benchmark_that_contributing_shows_runs(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, text = (ROOT / "CONTRIBUTING.md").read_text().split("## Benchmarks\n")
    (toy_folder / "toy.py").write_text(text.split("```python\n")[1].split("```")[0])
    assert run(toy_folder, "--quick") == 0
    assert "softmax, weighted sum" in capsys.readouterr().out


@pytest.mark.parametrize("op", available_ops(ROOT / "benchmarks"))
def test_quick_rows_of_every_benchmark_pass_their_check(op: str) -> None:
    for one in load(ROOT / "benchmarks", op).cases():
        assert one.flops >= 0 and one.bytes(4) == 2 * one.bytes(2) > 0
        if one.quick:
            problem = one.problem(torch.float32)
            grad_out = torch.randn_like(problem.ours(*problem.leaves)) if one.training else None
            check(problem, grad_out)


@pytest.mark.skipif(DEVICE != "cpu", reason="an example on the CPU")
def test_the_photo_example_agrees_and_shows_where_words_look(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    example = runpy.run_path(str(ROOT / "examples" / "photo_text.py"))
    assert example["main"]() == 0
    printed = capsys.readouterr().out
    for expected in ("china.jpg", "flower.jpg", "all that 'temple' looks at", "same output: yes"):
        assert expected in printed
