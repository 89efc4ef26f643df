"""``python -m mmkernels bench``: check, time, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import zip_longest

import torch

from mmkernels._info import collect

from . import report, suite
from .case import Case
from .engine import Engine, Row
from .machine import Ceilings, caption, measure_ceilings
from .options import DTYPES, available, parse
from .progress import Interruption, Progress
from .timing import clock

ROW_SECONDS, QUICK_ROW_SECONDS = 2.0, 0.1  # of timing, at most
INTERRUPTED = 130  # the shell's status of what Ctrl-C ended

Work = tuple[str, Case, torch.dtype]  # one row to measure, the op's name first


@dataclass
class Measured:
    """A run's result: the rows, the name of each op's baseline, what the machine reaches at best."""

    baselines: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    ceilings: Ceilings | None = None  # None where the run ended before they were known
    planned: int = 0  # rows asked for


def chosen(cases: Iterable[Case], args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; those that keep a GPU busy come first there, and not at all on a CPU."""
    asked = [case for case in cases if args.shapes in f"{case.group} {case.shape} {case.note}"]
    asked = [case for case in asked if case.quick or not args.quick]
    return [case for case in asked if case.gpu and args.device != "cpu"] + [case for case in asked if not case.gpu]


def in_turn(queues: Iterable[Sequence[Work]]) -> list[Work]:
    """The first of every queue, then the second of every queue, and so on until all are empty."""
    return [work for turn in zip_longest(*queues) for work in turn if work is not None]


def plan(args: argparse.Namespace) -> tuple[list[Work], Measured]:
    """What to measure, in order. Ops, dtypes and passes take turns, so that what the budget has only for the first rows
    reaches each of them."""
    folder = suite.benchmarks_dir()
    suites = {op: suite.load(folder, op) for op in args.ops or available()}
    work = in_turn(
        in_turn(
            [(op, case, DTYPES[name]) for case in chosen(given.cases(), args) if case.training is training]
            for name in args.dtypes
            for training in (False, True)
        )
        for op, given in suites.items()
    )
    if not work:
        raise SystemExit(f"bench: no row matches --shapes {args.shapes!r}")
    return work, Measured({op: given.baseline for op, given in suites.items()}, planned=len(work))


def measure(
    args: argparse.Namespace, start: float, work: Sequence[Work], into: Measured, interruption: Interruption
) -> None:
    """Measure the rows in their order until all are done or the budget is spent, the first one in any case."""
    dtypes = {name: DTYPES[name] for name in args.dtypes}
    into.ceilings = ceilings = measure_ceilings(dtypes, args.threads, args.device)
    engine = Engine(
        now=clock(args.threads, args.device),
        device=args.device,
        calls=1 if args.device == "cpu" else 10,
        ceilings=ceilings,
        row_seconds=QUICK_ROW_SECONDS if args.quick else ROW_SECONDS,
        compile=not (args.no_compile or args.quick),
        budget=args.budget,
        start=start,
    )
    progress = Progress(len(work), start, args.budget)
    try:
        for i, (op, case, dtype) in enumerate(work):
            if interruption.pressed or (i and engine.spent()):
                break
            progress.begin(f"{op} {case.group} {case.shape} {str(dtype)[6:]}")
            into.rows.append(engine.measure(op, case, dtype, rows_left=len(work) - i))
            progress.end()
    finally:
        progress.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if any result was wrong."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        import tqdm as _  # noqa: F401, known before anything is measured
    except ImportError:
        raise SystemExit("bench: tqdm is not installed; `pip install mmkernels[dev]` brings it") from None
    before, start, when = torch.get_num_threads(), time.perf_counter(), datetime.now()
    work, measured = plan(args)
    if not args.output.exists():
        args.output.mkdir()
        print(f"Created: {args.output}")
    interruption = Interruption()
    torch.set_num_threads(args.threads)
    try:
        machine = {**collect(), "device": args.device}
        print(f"{caption(machine)}\nEvery row: correctness first, gradients included, then the times.", flush=True)
        with interruption.noticed():
            measure(args, start, work, measured, interruption)
    finally:
        torch.set_num_threads(before)
    rows, ceilings = measured.rows, measured.ceilings
    if interruption.pressed and (not rows or ceilings is None):
        print("Interrupted before the first row: nothing was measured.")
        return INTERRUPTED
    assert ceilings is not None
    order = {key: i for i, key in enumerate((op, name) for op in measured.baselines for name in args.dtypes)}
    rows.sort(key=lambda row: order[row.op, row.dtype])
    show(args, measured, ceilings, machine, when)
    missing = measured.planned - len(rows)
    if interruption.pressed:
        print(f"Interrupted: {len(rows)} of {measured.planned} rows, which are kept.")
    elif missing:
        print(f"The budget of {args.budget:g} s was spent: {missing} of {measured.planned} rows were not measured.")
    wrong = [row for row in rows if row.error is not None]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong.")
    return INTERRUPTED if interruption.pressed else 1 if wrong else 0


def show(
    args: argparse.Namespace, measured: Measured, ceilings: Ceilings, machine: dict[str, object], when: datetime
) -> None:
    """Print the table and write the files."""
    rows = measured.rows
    baselines = {op: name for op, name in measured.baselines.items() if any(row.op == op for row in rows)}
    saved = report.save_json(args.output, rows, baselines, machine, ceilings, when)  # first: nothing else can lose it
    print("\n" + report.text_table(rows, baselines) + "\n")
    print(f"Machine: {caption(machine)}; {ceilings}.\n{report.BOUND}")
    print(f"Ours ran on: {report.served_by(rows)}.")
    for line in report.gaps(rows):
        print(line)
    for op, path in saved.items():
        written = [str(path)]
        try:
            from .plot import save_plot

            save_plot(path.with_suffix(".png"), op, rows, baselines[op], caption(machine))
            written.append(str(path.with_suffix(".png")))
        except ImportError:
            print("No plot: matplotlib is not installed.")
        print(f"Written: {', '.join(written)}")
    if args.update_readme:
        root = suite.benchmarks_dir().parent
        report.update_readme(root / "README.md", report.markdown_table(rows, baselines, machine, ceilings, when))
        (root / "docs" / "measured.md").write_text(report.markdown_rows(rows, baselines, machine, ceilings, when))
        print(f"Updated: {root / 'README.md'} and docs/measured.md")
    if args.report:
        args.report.write_text(report.markdown_rows(rows, baselines, machine, ceilings, when))
        print(f"Written: {args.report}")


if __name__ == "__main__":
    sys.exit(main())
