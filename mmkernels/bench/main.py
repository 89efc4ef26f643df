"""``python -m mmkernels bench``: check, time, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import zip_longest
from pathlib import Path

import torch

from mmkernels._info import collect

from . import report
from .case import Case
from .engine import Engine, Row
from .machine import Ceilings, caption, measure_ceilings
from .suite import available_ops, benchmarks_dir, load
from .timing import clock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Work = tuple[str, Case, torch.dtype]  # one row to measure, the op's name first


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkernels bench", description=__doc__)
    budget = "of the whole run, roughly; every row is checked in any case, with 0 hardly timed and never compiled"
    parser.add_argument("--ops", default="", help="comma-separated ops, default all that have a file in benchmarks/")
    parser.add_argument("--dtypes", default="float32,bfloat16", help=f"comma-separated of {', '.join(DTYPES)}")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="only rows that mention TEXT")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; CPU time with 1, else wall time")
    parser.add_argument("--quick", action="store_true", help="a few small rows, briefly, nothing compiled")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help=budget)
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile column out")
    parser.add_argument("--output", type=Path, default=Path("bench_results"), metavar="DIR", help="for JSON and plots")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the whole table here, in Markdown")
    parser.add_argument("--update-readme", action="store_true", help="rewrite README's table, docs/measured.md")
    args = parser.parse_args(argv)
    args.ops = [op for op in args.ops.split(",") if op]
    args.dtypes = [name.strip() for name in args.dtypes.split(",")]
    unknown = [name for name in args.dtypes if name not in DTYPES]
    if unknown:
        parser.error(f"--dtypes: expected {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    return args


def chosen(cases: Iterable[Case], args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; those that keep a GPU busy come first there, and not at all on a CPU."""
    asked = [case for case in cases if args.shapes in f"{case.group} {case.shape} {case.note}"]
    asked = [case for case in asked if case.quick or not args.quick]
    return [case for case in asked if case.gpu and args.device != "cpu"] + [case for case in asked if not case.gpu]


def in_turn(queues: Iterable[Sequence[Work]]) -> list[Work]:
    """The first of every queue, then the second of every queue, and so on until all are empty."""
    return [work for turn in zip_longest(*queues) for work in turn if work is not None]


def measure(args: argparse.Namespace, start: float) -> tuple[list[Row], dict[str, str], Ceilings]:
    """All rows, the name of each op's baseline, and what the machine reaches at best.

    Ops, dtypes and passes take turns, so that what the budget has only for the first rows reaches each of them.
    """
    from tqdm import tqdm

    folder = benchmarks_dir()
    suites = {op: load(folder, op) for op in args.ops or available_ops(folder)}
    work = in_turn(
        in_turn(
            [(op, case, DTYPES[name]) for case in chosen(suite.cases(), args) if case.training is training]
            for name in args.dtypes
            for training in (False, True)
        )
        for op, suite in suites.items()
    )
    if not work:
        raise SystemExit(f"bench: no row matches --shapes {args.shapes!r}")
    ceilings = measure_ceilings({name: DTYPES[name] for name in args.dtypes}, args.threads, args.device)
    engine = Engine(
        now=clock(args.threads, args.device),
        device=args.device,
        calls=1 if args.device == "cpu" else 10,
        ceilings=ceilings,
        row_seconds=0.1 if args.quick else 2.0,
        compile=not (args.no_compile or args.quick),
        budget=args.budget,
        start=start,
    )
    rows: list[Row] = []
    quiet = 0.1 if sys.stderr.isatty() else 15.0  # a log file needs a line now and then, not ten a second
    with tqdm(total=len(work), unit="row", dynamic_ncols=True, mininterval=quiet) as bar:
        try:
            for i, (op, case, dtype) in enumerate(work):
                bar.set_description(f"{op} {case.group} {case.shape} {str(dtype)[6:]}", refresh=sys.stderr.isatty())
                rows.append(engine.measure(op, case, dtype, rows_left=len(work) - i))
                bar.update()
        except KeyboardInterrupt:
            print(f"Interrupted: {len(rows)} of {len(work)} rows.")
    order = {key: i for i, key in enumerate((op, name) for op in suites for name in args.dtypes)}
    rows.sort(key=lambda row: order[row.op, row.dtype])
    return rows, {op: suite.baseline for op, suite in suites.items()}, ceilings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if any result was wrong."""
    args = parse(sys.argv[1:] if argv is None else argv)
    before, start, when = torch.get_num_threads(), time.perf_counter(), datetime.now()
    torch.set_num_threads(args.threads)
    try:
        machine = {**collect(), "device": args.device}
        print(f"{caption(machine)}\nEvery row: correctness first, gradients included, then the times.")
        sys.stdout.flush()
        rows, baselines, ceilings = measure(args, start)
    finally:
        torch.set_num_threads(before)
    print("\n" + report.text_table(rows, baselines) + "\n")
    print(f"Machine: {caption(machine)}; {ceilings}.\n{report.BOUND}")
    print(f"Ours ran on: {report.served_by(rows)}.")
    for line in report.gaps(rows):
        print(line)
    for op, path in report.save_json(args.output, rows, baselines, machine, ceilings, when).items():
        written = [str(path)]
        try:
            from .plot import save_plot

            save_plot(path.with_suffix(".png"), op, rows, baselines[op], caption(machine))
            written.append(str(path.with_suffix(".png")))
        except ImportError:
            print("No plot: matplotlib is not installed.")
        print(f"Written: {', '.join(written)}")
    if args.update_readme:
        root, measured = benchmarks_dir().parent, (rows, baselines, machine, ceilings, when)
        report.update_readme(root / "README.md", report.markdown_table(*measured))
        (root / "docs" / "measured.md").write_text(report.markdown_rows(*measured))
        print(f"Updated: {root / 'README.md'} and docs/measured.md")
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(report.markdown_rows(rows, baselines, machine, ceilings, when))
        print(f"Written: {args.report}")
    wrong = [row for row in rows if row.error is not None]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
