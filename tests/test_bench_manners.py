"""The benchmark's command line: what is wrong is said at once and in words, and what was measured is never lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from bench_toys import false_clock, run, toy_benchmarks

from mmkernels.bench import main, options
from mmkernels.bench.case import Case
from mmkernels.bench.engine import Engine, Row
from mmkernels.bench.progress import Interruption, remaining, span


@pytest.fixture
def toy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_benchmarks(tmp_path, monkeypatch)


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*args: object) -> None:
        raise AssertionError("it was measured before it was refused")

    monkeypatch.setattr(main, "measure", measured)


def latest(folder: Path) -> list[dict[str, object]]:
    return json.loads((folder.parent / "results" / "latest.json").read_text())["ops"]["toy"]["rows"]


@pytest.mark.parametrize("words", [["toy", "--quick"], ["--quick", "toy"], ["--ops", "toy", "--quick", "toy"]])
def test_ops_are_named_with_and_without_their_option(toy_folder: Path, words: list[str]) -> None:
    (toy_folder / "other.py").write_text((toy_folder / "toy.py").read_text())
    assert run(toy_folder, *words) == 0
    assert len(latest(toy_folder)) == 4
    assert list(json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]) == ["toy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["toi"], "no benchmark named 'toi' (did you mean toy?); available: toy"),
        (["--ops", "nothing"], "no benchmark named 'nothing'; available: toy"),
        (["--dtypes", "int8"], "--dtypes: expected float32, bfloat16, float16; got int8"),
        (["--dtypes", ","], "--dtypes: expected float32, bfloat16, float16; got none"),
        (["--threads", "0"], "--threads: expected numbers of at least 1, separated by commas; got '0'"),
        (["--threads", "1,two"], "--threads: expected numbers of at least 1, separated by commas; got '1,two'"),
        (["--pass", "backward"], "--pass: expected forward, training or both; got backward"),
        (["--workload", "no such row"], "no row is left by --shapes 'default', --workload ['no such row']"),
        (["--shapes", "huge"], "--shapes: expected default, quick, large, lengths, a file, or sizes such as"),
        (["--shapes", "Lq=8"], "--shapes: no op takes 'Lq=8'; each takes some of these:\n  toy: n=6"),
        (["--shapes", "n=six"], "n: expected a value such as 6; got six"),
        (["--shapes", "n="], "expected NAME=VALUE,...; got 'n='"),
        (["--providers", "ours@mars"], "--providers: expected compiled, eager, ours, ours@"),
        (["--providers", "compiled@mars"], "compiled@mars: torch.compile has no backend 'mars' here"),
        (["--compare", "nowhere.json"], "--compare: expected a file that a run left; nowhere.json: No such file"),
        (["--compare", __file__], "such as bench_results/latest.json"),
        (["--fail-below", "0"], "--fail-below: expected a ratio, more than 0; got 0"),
        (["--plugin", "nowhere.py"], "--plugin: expected a Python file; nowhere.py is none"),
        (["--update-readme", "--threads", "1,2"], "--update-readme: expected one number of threads"),
        (["--budget", "0"], "--budget: expected seconds, more than 0; got 0"),
        (["--budget", "-1"], "--budget: expected seconds, more than 0; got -1"),
        (["--budget", "nan"], "--budget: expected seconds, more than 0; got nan"),
        (["--report", "no/such/folder/report.md"], "--report: expected a file in a folder that exists; "),
        (["--report", "."], "--report: expected a file; . is a folder"),
    ],
)
@pytest.mark.usefixtures("nothing_is_measured")
def test_a_wrong_word_is_refused_before_anything_is_measured(
    toy_folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(toy_folder, *words)
    assert left.value.code == 2 and said in capsys.readouterr().err
    assert not (toy_folder.parent / "results").exists()


@pytest.mark.usefixtures("nothing_is_measured")
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = toy_folder / "toy.py"
    for output, said in (
        (file, "is a file"),
        (file / "inside", "expected a folder in one that exists"),
        (toy_folder / "two" / "levels", "expected a folder in one that exists"),
    ):
        with pytest.raises(SystemExit) as left:
            main.main(["--output", str(output)])
        assert left.value.code == 2 and said in capsys.readouterr().err
    assert not (toy_folder / "two").exists()


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(options.tempfile, "TemporaryFile", refused)
    for problem in (options.unwritable_folder(tmp_path), options.unwritable_file(tmp_path / "report.md")):
        assert problem is not None and "Permission denied" in problem


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_gpu_that_is_not_there_is_refused(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        run(toy_folder, "--device", "cuda")
    assert left.value.code == 2 and "got cuda, and torch sees no GPU" in capsys.readouterr().err


def test_a_folder_that_is_made_is_named(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(toy_folder, "--quick") == 0
    assert f"Created: {toy_folder.parent / 'results'}" in capsys.readouterr().out
    assert run(toy_folder, "--quick") == 0
    assert "Created" not in capsys.readouterr().out


def test_help_has_examples_and_names_every_op(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(toy_folder, "--help")
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "ops: toy\n" in printed
    examples = [line.split("  ")[1] for line in printed.splitlines() if line.startswith("  python -m mmkernels bench")]
    assert len(examples) >= 3
    for example in examples:
        words = example.split()[4:]
        options.build_parser().parse_intermixed_args(words)


def interrupted_at(row: int, monkeypatch: pytest.MonkeyPatch, swallow: bool = False) -> None:
    """Ctrl-C while the given row is measured; `swallow` as code does that catches everything."""
    measure, done = Engine.measure, [0]

    def measured(self: Engine, op: str, case: Case, dtype: torch.dtype, rows_left: int) -> Row:
        if done[0] == row:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if not swallow:
                    raise
        done[0] += 1
        return measure(self, op, case, dtype, rows_left)

    monkeypatch.setattr(Engine, "measure", measured)


@pytest.mark.parametrize("swallow", [False, True], ids=["at once", "swallowed by foreign code"])
def test_an_interrupted_run_keeps_what_was_measured(
    toy_folder: Path, swallow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_at(2, monkeypatch, swallow)
    assert run(toy_folder, "--quick") == 130
    printed, rows = capsys.readouterr().out, latest(toy_folder)
    assert len(rows) == 2 + swallow and all(row["seconds"]["ours"] > 0 for row in rows)
    assert f"Interrupted: {2 + swallow} of 4 rows, which are kept." in printed and "geometric mean" not in printed


def test_an_interruption_before_the_first_row_is_said_in_words(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_at(0, monkeypatch)
    assert run(toy_folder, "--quick") == 130
    assert "Interrupted before the first row: nothing was measured." in capsys.readouterr().out
    monkeypatch.setattr(main, "measure_ceilings", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(toy_folder, "--quick") == 130


def test_the_handler_of_an_interruption_is_put_back() -> None:
    before, interruption = signal.getsignal(signal.SIGINT), Interruption()
    with interruption.noticed():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the block went on")
    assert interruption.pressed and signal.getsignal(signal.SIGINT) is before
    seen: list[bool] = []

    def elsewhere() -> None:
        with Interruption().noticed():
            seen.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [True]


def test_no_row_begins_for_which_the_budget_has_no_time(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy_folder / "slow.py").write_text((toy_folder / "toy.py").read_text())
    told = false_clock(monkeypatch)
    measure = Engine.measure

    def slowly(self: Engine, op: str, case: Case, dtype: torch.dtype, rows_left: int) -> Row:
        told[0] += {"slow": 1000.0, "toy": 10.0}[op]
        return measure(self, op, case, dtype, rows_left)

    def measured() -> dict[str, int]:
        ops = json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]
        return {op: len(found["rows"]) for op, found in ops.items()}

    monkeypatch.setattr(Engine, "measure", slowly)
    assert run(toy_folder, "--quick", "--budget", "2600") == 0
    assert measured() == {"slow": 2, "toy": 4}  # a third row of the slow op would end at 3020
    assert "The budget of 2600 s was spent: 2 of 8 rows were not measured." in capsys.readouterr().out
    assert run(toy_folder, "--quick", "--budget", "300") == 0
    assert measured() == {"slow": 1}  # a budget has a row, however small it is


def test_the_bar_tells_what_is_left_by_the_pace_and_never_past_the_budget() -> None:
    assert remaining(0, 10, elapsed=5.0, measuring=0.0, budget=60.0) == 55.0
    assert remaining(5, 10, elapsed=15.0, measuring=10.0, budget=60.0) == 10.0
    assert remaining(1, 100, elapsed=15.0, measuring=10.0, budget=60.0) == 45.0
    assert remaining(1, 100, elapsed=70.0, measuring=65.0, budget=60.0) == 0.0
    assert [span(s) for s in (0.4, 59.6, 245.0, -1.0)] == ["0:00", "1:00", "4:05", "0:00"]
