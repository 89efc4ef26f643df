"""The command line of ``python -m mmkernels bench``: what is wrong with it is said before anything is measured."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
import tempfile
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import compare, plugin, providers, suite
from .shapes import PRESETS, specifications

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

EXAMPLES = """\
examples:
  python -m mmkernels bench --quick                          a few small rows of every op
  python -m mmkernels bench concat_linear cross_attention    two ops, all of their rows
  python -m mmkernels bench cross_attention --shapes B=2,H=8,Lq=1024,Lk=77,D=64 --providers ours,torch,ours@avx2
  python -m mmkernels bench cross_attention --shapes lengths --pass forward --threads 1,2
  python -m mmkernels bench modulated_norm --latency --memory
  python -m mmkernels bench --budget 60 --report table.md    a minute, every row in Markdown as well
  python -m mmkernels bench --quick --compare bench_results/latest.json --fail-below 0.8
  python -m mmkernels bench scaled_softmax --plugin my_ops.py

ops: {ops}

shapes: {shapes}

providers:
{providers}

Exit status: 0, 1 if a result was wrong or --fail-below was not met, 2 if the command line was, 130 if interrupted.
"""


def available() -> list[str]:
    """The ops that can be measured; none where there is no ``benchmarks`` folder."""
    try:
        return suite.available_ops(suite.benchmarks_dir())
    except FileNotFoundError:
        return []


def build_parser() -> argparse.ArgumentParser:
    named = ", ".join(available()) or "none: run from a checkout of the project"
    ops = textwrap.fill(named, 100, subsequent_indent="     ", break_on_hyphens=False)
    presets = "".join(f"\n  {name:9} {what}" for name, what in PRESETS.items())
    shapes = f"{presets}\n  B=2,...   sizes by letter or field; several with ';' between, or one a line in a file"
    here = "\n".join(
        textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for line in providers.presence().splitlines()
    )
    parser = argparse.ArgumentParser(
        prog="python -m mmkernels bench",
        description="Check every op against float64, then time it against plain torch.",
        epilog=EXAMPLES.format(ops=ops, shapes=shapes.strip(), providers=here),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    budget = "of the whole run; what it has no time for is left out and named (default: %(default)g)"
    parser.add_argument("op", nargs="*", metavar="OP", help="what to measure (default: all that are listed below)")
    parser.add_argument("--ops", default="", metavar="OP,...", help="the same, separated by commas")
    parser.add_argument("--dtypes", default="float32,bfloat16", help=f"comma-separated of {', '.join(DTYPES)}")
    add = parser.add_argument
    workload = (
        "only rows whose group, shape or note mentions TEXT, as a model's name (benchmarks/workloads.py has stacks of "
        "models, which are measured only so or by OP); may be given several times"
    )
    add("--workload", action="append", default=[], metavar="TEXT", help=workload)
    shapes_help = f"{', '.join(PRESETS)}, a file, or sizes such as B=2,H=8,Lq=1024,Lk=77,D=64 (see below)"
    add("--shapes", default="default", metavar="WHICH", help=shapes_help)
    add("--providers", default="", metavar="NAME,...", help=providers.NAMES)
    add("--pass", dest="passes", default="forward,training", metavar="PASS,...", help="forward, training or both")
    add("--threads", default="1", metavar="N,...", help="torch threads; CPU time with 1 alone, else wall time")
    add("--latency", action="store_true", help="batches of 1, single calls on the wall clock: p50, p90, p99")
    add("--memory", action="store_true", help="also the bytes at the peak, and what autograd keeps")
    add("--compare", type=Path, metavar="FILE", help="an earlier run's latest.json, to say what is faster and slower")
    fail = "exit with 1 if a row is slower than RATIO times the run of --compare, or torch where there is none"
    add("--fail-below", type=float, metavar="RATIO", help=fail)
    add("--plugin", type=Path, metavar="FILE", help="Python that adds ops and providers (docs/benchmarking.md)")
    parser.add_argument("--quick", action="store_true", help="a few small rows, briefly, nothing compiled")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help=budget)
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile column out")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench_results"),
        metavar="DIR",
        help="for JSON, plots and report.html; made if only its last folder is missing (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write every row here, in Markdown, or the page where it ends in .html; its folder has to exist",
    )
    parser.add_argument("--update-readme", action="store_true", help="rewrite README's table, docs/generated/")
    return parser


def refuse(problem: str) -> NoReturn:
    """Leave as for a wrong command line: what is wrong shows when the benchmarks are loaded."""
    print(f"python -m mmkernels bench: error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked; leaves with status 2 where they are wrong."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    args.ops = list(dict.fromkeys([*args.op, *_listed(args.ops)]))
    args.dtypes = list(dict.fromkeys(_listed(args.dtypes)))
    if not args.dtypes:
        parser.error(f"--dtypes: expected {', '.join(DTYPES)}; got none")
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        parser.error(f"--dtypes: expected {', '.join(DTYPES)}; got {', '.join(unknown)}")
    args.passes = list(dict.fromkeys(_listed(args.passes)))
    if not args.passes or (unknown := [name for name in args.passes if name not in ("forward", "training")]):
        parser.error(f"--pass: expected forward, training or both; got {', '.join(args.passes) or 'none'}")
    counts = _listed(args.threads)
    if not counts or not all(count.isdecimal() and int(count) > 0 for count in counts):
        parser.error(f"--threads: expected numbers of at least 1, separated by commas; got {args.threads!r}")
    args.threads = list(dict.fromkeys(map(int, counts)))
    if args.fail_below is not None and not (args.fail_below > 0 and math.isfinite(args.fail_below)):
        parser.error(f"--fail-below: expected a ratio, more than 0; got {args.fail_below:g}")
    if not (args.budget > 0 and math.isfinite(args.budget)):
        parser.error(f"--budget: expected seconds, more than 0; got {args.budget:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a device that is here; got cuda, and torch sees no GPU")
    args.providers = _listed(args.providers)
    try:
        args.given = specifications(args.shapes)
    except ValueError as wrong:
        parser.error(f"--shapes: {wrong}")
    try:
        args.baseline = None if args.compare is None else compare.read(args.compare)
    except ValueError as wrong:
        parser.error(f"--compare: {wrong}")
    try:
        args.plugged = plugin.Plugin() if args.plugin is None else plugin.load(args.plugin)
    except ValueError as wrong:
        parser.error(f"--plugin: {wrong}")
    if args.update_readme and (len(args.threads) > 1 or args.latency or args.given):
        parser.error("--update-readme: expected one number of threads, no --latency and no shapes of one's own")
    if problem := unknown_op(args.ops, args.plugged.ops):
        parser.error(problem)
    if problem := unwritable_folder(args.output):
        parser.error(f"--output: {problem}")
    if args.report is not None and (problem := unwritable_file(args.report)):
        parser.error(f"--report: {problem}")
    return args


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def unknown_op(asked: Sequence[str], plugged: Collection[str] = ()) -> str | None:
    """What to say of ops that have no benchmark, None where all have one."""
    there = sorted({*available(), *plugged})
    if not there:
        return "no benchmarks/ folder: run from a checkout of the project"
    for name in asked:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            return f"no benchmark named {name!r}{meant}; available: {', '.join(there)}"
    return None


def unwritable_folder(path: Path) -> str | None:
    """Why no file can be written into the folder, made first where only itself is missing; None where one can."""
    if path.exists() and not path.is_dir():
        return f"expected a folder; {path} is a file"
    there = path if path.exists() else path.absolute().parent
    if not there.is_dir():
        return f"expected a folder in one that exists; {there} does not"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"expected a folder that can be written to; {there}: {error.strerror}"


def unwritable_file(path: Path) -> str | None:
    """Why the file cannot be written, None where it can."""
    if path.is_dir():
        return f"expected a file; {path} is a folder"
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"expected a file in a folder that exists; {folder} does not"
    try:
        if path.exists():
            with path.open("ab"):
                return None
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"expected a file that can be written; {path}: {error.strerror}"
