"""``python -m mmkernels bench``: check, time, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import zip_longest
from typing import Any

import torch

from mmkernels._info import collect

from . import compare, html, providers, report, shapes, suite, summary
from .case import Case
from .engine import Engine, Row
from .machine import Ceilings, caption, measure_ceilings
from .options import DTYPES, available, parse, refuse
from .plugin import Provider
from .progress import Interruption, Progress
from .timing import clock

ROW_SECONDS, QUICK_ROW_SECONDS = 2.0, 0.1  # of timing, at most
STACKS = "workloads"  # whole stacks of models, some of them seconds long: measured where they are asked for
PLOTTING = 0.4  # seconds of the budget for each op's plot, where they are no more than
MOST_REPORTING = 0.15  # of it
INTERRUPTED = 130  # the shell's status of what Ctrl-C ended

Work = tuple[str, Case, torch.dtype, int]  # one row to measure: op, case, dtype, threads


@dataclass
class Measured:
    """A run's result: the rows, the name of each op's baseline, what the machine reaches at best."""

    baselines: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[int, Ceilings] = field(default_factory=dict)  # by threads; none where the run ended before
    planned: int = 0  # rows asked for
    names: frozenset[str] = frozenset()  # of what competes
    providers: Mapping[str, Provider] = field(default_factory=dict)


def mentioned(case: Case, texts: Sequence[str]) -> bool:
    """Whether the row has one of the texts in it, or none is asked for."""
    row = f"{case.group} {case.shape} {case.note}".lower()
    return not texts or any(text.lower() in row for text in texts)


def chosen(cases: Iterable[Case], args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; those that keep a GPU busy come first there, and not at all on a CPU."""
    asked = [case for case in cases if mentioned(case, args.workload)]
    asked = [case for case in asked if case.quick or not args.quick]
    return [case for case in asked if case.gpu and args.device != "cpu"] + [case for case in asked if not case.gpu]


def in_turn(queues: Iterable[Sequence[Work]]) -> list[Work]:
    """The first of every queue, then the second of every queue, and so on until all are empty."""
    return [work for turn in zip_longest(*queues) for work in turn if work is not None]


def plan(args: argparse.Namespace) -> tuple[list[Work], Measured]:
    """What to measure, in order. Ops, dtypes and passes take turns, so that what the budget has only for the first rows
    reaches each of them."""
    suites = load_suites(args)
    try:
        everyone = {**providers.builtin(args.device), **args.plugged.providers}
        names = providers.selected(args.providers, suites, args.plugged.providers, args.device)
    except ValueError as wrong:
        refuse(f"--providers: {wrong}")
    work = in_turn(
        in_turn(
            [
                (op, case, DTYPES[name], threads)
                for case in chosen(given.cases(), args)
                for threads in args.threads
                if case.training is (turn == "training")
            ]
            for name in args.dtypes
            for turn in args.passes
        )
        for op, given in suites.items()
    )
    if not work:
        refuse(f"no row is left by --shapes {args.shapes!r}, --workload {args.workload!r} and what else was asked for")
    baselines = {op: given.baseline for op, given in suites.items()}
    return work, Measured(baselines, planned=len(work), names=names, providers=everyone)


def load_suites(args: argparse.Namespace) -> dict[str, suite.Suite]:
    """The suites of the ops, with the shapes that were asked for."""
    own = args.plugged.ops
    whole_run = [op for op in available() if op != STACKS or args.workload]
    ops = args.ops or [*whole_run, *(op for op in own if op not in available())]
    try:
        whole = {op: own[op]() if op in own else suite.load(suite.benchmarks_dir(), op) for op in ops}
        asked = {op: shapes.of_suite(given, args.shapes, args.given) for op, given in whole.items()}
    except ValueError as wrong:
        refuse(str(wrong))
    fitting = {op: given for op, given in asked.items() if given.forward or given.training}
    if args.given and not fitting:
        refuse(f"--shapes: no op takes {args.shapes!r}; each takes some of these:\n{shapes.fields_of(whole)}")
    if args.given and len(fitting) < len(asked):
        print(f"--shapes fits {', '.join(fitting)} alone.")
    return {op: shapes.of_one(given) if args.latency else given for op, given in fitting.items()}


def measure(
    args: argparse.Namespace, start: float, work: Sequence[Work], into: Measured, interruption: Interruption
) -> None:
    """Measure the rows in their order, the first one in any case, then those for which the budget has time: as much as
    the op's longest row took."""
    dtypes = {name: DTYPES[name] for name in args.dtypes}
    for threads in args.threads:
        torch.set_num_threads(threads)
        into.ceilings[threads] = measure_ceilings(dtypes, max(args.threads), args.device)
    engine = Engine(
        now=clock(max(args.threads), args.device),  # one clock for all that is compared
        device=args.device,
        calls=1 if args.device == "cpu" else 10,
        ceilings=into.ceilings[args.threads[0]],
        row_seconds=QUICK_ROW_SECONDS if args.quick else ROW_SECONDS,
        compile=not (args.no_compile or args.quick),
        budget=args.budget,
        start=start,
        names=into.names,
        providers=into.providers,
        latency=args.latency,
        memory=args.memory,
    )
    longest: dict[str, float] = {}  # seconds of an op's rows so far, without compiling
    reporting = min(PLOTTING * len(into.baselines), MOST_REPORTING * args.budget)
    progress = Progress(len(work), start, args.budget)
    try:
        for i, (op, case, dtype, threads) in enumerate(work):
            if interruption.pressed:
                break
            if i and engine.left() - reporting <= longest.get(op, 0.0):
                continue
            begin, compiling = time.perf_counter(), engine.for_compiling
            progress.begin(f"{op} {case.group} {case.shape} {str(dtype)[6:]}")
            torch.set_num_threads(threads)
            engine.ceilings = into.ceilings[threads]
            row = engine.measure(op, case, dtype, rows_left=len(work) - i)
            row.threads = threads if len(args.threads) > 1 else 0
            into.rows.append(row)
            took = time.perf_counter() - begin - (compiling - engine.for_compiling)
            longest[op] = max(longest.get(op, 0.0), took)
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
    torch.set_num_threads(args.threads[0])
    try:
        machine = {**collect(), "device": args.device, "thread_counts": args.threads}
        print(f"{caption(machine)}\nEvery row: correctness first, gradients included, then the times.", flush=True)
        with interruption.noticed():
            measure(args, start, work, measured, interruption)
    finally:
        torch.set_num_threads(before)
    rows = measured.rows
    if not rows:
        print("Interrupted before the first row: nothing was measured.")
        return INTERRUPTED
    order = {key: i for i, key in enumerate((op, name) for op in measured.baselines for name in args.dtypes)}
    rows.sort(key=lambda row: (order[row.op, row.dtype], row.threads))
    failed = show(args, measured, machine, when)
    missing = measured.planned - len(rows)
    if interruption.pressed:
        print(f"Interrupted: {len(rows)} of {measured.planned} rows, which are kept.")
    elif missing:
        print(f"The budget of {args.budget:g} s was spent: {missing} of {measured.planned} rows were not measured.")
    wrong = [row for row in rows if row.error is not None]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong.")
    return INTERRUPTED if interruption.pressed else 1 if wrong or failed else 0


def show(args: argparse.Namespace, measured: Measured, machine: dict[str, Any], when: datetime) -> bool:
    """Print the table and write the files; whether --fail-below was not met."""
    rows, ceilings = measured.rows, next(iter(measured.ceilings.values()))
    baselines = {op: name for op, name in measured.baselines.items() if any(row.op == op for row in rows)}
    changes = None if args.baseline is None else compare.changes(rows, args.baseline, args.threads[0])
    as_json = [asdict(change) for change in changes or ()]
    # First of all: nothing that comes after can lose it.
    saved = report.save_json(args.output, rows, baselines, machine, measured.ceilings, when, as_json)
    print("\n" + report.text_table(rows, baselines) + "\n")
    for threads, reached in measured.ceilings.items():
        on = f" on {threads} thread{'s' * (threads > 1)}" if len(measured.ceilings) > 1 else ""
        print(f"Machine{on}: {caption(machine)}; {reached}.")
    print(f"{report.BOUND}\nOurs ran on: {report.served_by(rows)}.")
    for line in (*report.gaps(rows), *report.latency_lines(rows), *report.memory_lines(rows)):
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
        every_row = report.markdown_rows(rows, baselines, machine, ceilings, when)
        (root / "docs" / "generated" / "measured.md").write_text(every_row)
        print(f"Updated: {root / 'README.md'} and docs/generated/measured.md")
    page = html.page(rows, baselines, machine, measured.ceilings, when, changes or ())
    (args.output / "report.html").write_text(page, encoding="utf-8")
    if args.report is not None:
        as_page = args.report.suffix.lower() in (".html", ".htm")
        text = page if as_page else report.markdown_rows(rows, baselines, machine, ceilings, when)
        args.report.write_text(text, encoding="utf-8")
        print(f"Written: {args.report}")
    print()
    if changes is not None:
        print("\n".join(compare.words(changes, args.baseline, machine["machine"]["cpu"])))
    print("\n".join(summary.words(rows, baselines)))
    print(f"Report: {args.output / 'report.html'}")
    slow = [] if args.fail_below is None else compare.below(rows, changes, args.fail_below)
    for line in slow:
        print(f"Below {args.fail_below:g}: {line}")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
