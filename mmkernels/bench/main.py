"""``python -m mmkernels bench``: check, time, report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from mmkernels._info import collect

from . import report
from .case import available_ops, benchmarks_dir, load
from .engine import Engine, Row
from .machine import caption
from .timing import clock, gemm_rate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mmkernels bench", description=__doc__)
    parser.add_argument("--ops", default="", help="comma-separated ops, default all that have a file in benchmarks/")
    parser.add_argument("--dtypes", default="float32,bfloat16", help=f"comma-separated of {', '.join(DTYPES)}")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="only rows that mention TEXT")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; CPU time with 1, else wall time")
    parser.add_argument("--quick", action="store_true", help="a few small rows, briefly, nothing compiled")
    parser.add_argument("--budget", type=float, default=190.0, metavar="SECONDS", help="of the whole run, roughly")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile column out")
    parser.add_argument("--output", type=Path, default=Path("bench_results"), metavar="DIR", help="for JSON and plots")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="where to run")
    parser.add_argument("--update-readme", action="store_true", help="rewrite the README's measured table")
    args = parser.parse_args(argv)
    args.ops = [op for op in args.ops.split(",") if op]
    args.dtypes = [name.strip() for name in args.dtypes.split(",")]
    unknown = [name for name in args.dtypes if name not in DTYPES]
    if unknown:
        parser.error(f"--dtypes: expected {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    return args


def ceilings(dtypes: Sequence[str], threads: int) -> dict[torch.dtype, float]:
    """The rate of a plain matrix product per dtype. A CPU without arithmetic in a dtype can still convert to float32
    and multiply there, so float32's rate is the ceiling of a dtype whose own product is slower."""
    now = clock(threads)
    rates = {name: gemm_rate(DTYPES[name], now) for name in {"float32", *dtypes}}
    return {DTYPES[name]: max(rates[name], rates["float32"]) for name in dtypes}


def measure(args: argparse.Namespace) -> tuple[list[Row], dict[str, str], dict[str, float]]:
    """All rows, the name of each op's baseline, and the GEMM rate by dtype."""
    from tqdm import tqdm

    folder = benchmarks_dir()
    modules = {op: load(folder, op) for op in args.ops or available_ops(folder)}
    work = [
        (op, case, DTYPES[name])
        for op, module in modules.items()
        for name in args.dtypes
        for case in module.cases()
        if (case.quick or not args.quick) and args.shapes in f"{case.group} {case.shape} {case.note}"
    ]
    if not work:
        raise SystemExit(f"bench: no row matches --shapes {args.shapes!r}")
    peaks = ceilings(args.dtypes, args.threads)
    compile = not (args.no_compile or args.quick)
    # Of a row's share about a quarter goes into timing; the check and the compilation need the rest.
    seconds = 0.1 if args.quick else min(max(args.budget / len(work) / 4, 0.1), 2.0)
    engine = Engine(
        now=clock(args.threads),
        peaks=peaks,
        row_seconds=seconds,
        compile=compile,
        budget=args.budget,
    )
    rows: list[Row] = []
    quiet = 0.1 if sys.stderr.isatty() else 15.0  # a log file needs a line now and then, not ten a second
    with tqdm(total=len(work), unit="row", dynamic_ncols=True, mininterval=quiet) as bar:
        for i, (op, case, dtype) in enumerate(work):
            bar.set_description(f"{op} {case.group} {case.shape} {str(dtype)[6:]}", refresh=sys.stderr.isatty())
            rows.append(engine.measure(op, case, dtype, progress=(i + 1) / len(work)))
            bar.update()
    return rows, {op: module.BASELINE for op, module in modules.items()}, {str(d)[6:]: r for d, r in peaks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if any result was wrong."""
    args = parse(sys.argv[1:] if argv is None else argv)
    before, start, when = torch.get_num_threads(), time.perf_counter(), datetime.now()
    torch.set_num_threads(args.threads)
    try:
        machine = collect()
        print(f"{caption(machine)}\nEvery row: correctness first, gradients included, then the times.")
        sys.stdout.flush()
        rows, baselines, peaks = measure(args)
    finally:
        torch.set_num_threads(before)
    print("\n" + report.text_table(rows, baselines) + "\n")
    print(f"Machine: {caption(machine)}; a plain matrix product: {report.ceiling_text(peaks)}.")
    print(f"Ours ran on: {report.served_by(rows)}.")
    for line in report.gaps(rows):
        print(line)
    for op, path in report.save_json(args.output, rows, baselines, machine, peaks, when).items():
        written = [str(path)]
        try:
            from .plot import save_plot

            save_plot(path.with_suffix(".png"), op, rows, baselines[op], caption(machine))
            written.append(str(path.with_suffix(".png")))
        except ImportError:
            print("No plot: matplotlib is not installed.")
        print(f"Written: {', '.join(written)}")
    if args.update_readme:
        readme = benchmarks_dir().parent / "README.md"
        report.update_readme(readme, report.markdown_table(rows, baselines, machine, peaks, when))
        print(f"Updated: {readme}")
    wrong = [row for row in rows if row.error is not None]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s, {len(wrong)} wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
