"""What is left of a run: the table on the terminal, the JSON file and the README's table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .engine import Row
from .machine import Ceilings, caption

README_BEGIN = "<!-- measured: written by `python -m mmkernels bench --update-readme` -->"
README_END = "<!-- /measured -->"

BOUND = (
    "Bound: the arithmetic at the matrix product's rate or the bytes (MB) at the memory's, whichever takes longer; "
    "over 100 % of it, data stayed in a nearer cache."
)

GroupKey = tuple[str, str, str]  # op, dtype (and threads), group


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the values that are there, None where none is."""
    logs = [math.log(v) for v in values if v is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def grouped(rows: Sequence[Row]) -> dict[GroupKey, list[Row]]:
    groups: dict[GroupKey, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.setting, row.group), []).append(row)
    return groups


def milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def megabytes(row: Row) -> str:
    return f"{row.bytes / 1e6:.3g}" if row.bytes < 1e8 else f"{row.bytes / 1e6:.0f}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def text_table(rows: Sequence[Row], baselines: dict[str, str]) -> str:
    """The final table; a group of rows ends in its geometric means. `baselines` names each op's baseline."""
    lines: list[str] = []
    shape_width = max((len(row.shape) for row in rows), default=0)
    note_width = max((len(row.note) for row in rows), default=0)
    label_width = shape_width + note_width + 4
    headed: tuple[str, str] | None = None
    for (op, dtype, group), members in grouped(rows).items():
        others = other_contenders(rows, op)
        columns = ["ours", "bound", "of bound", "MB", baselines[op], "compiled", *others]
        columns += ["x torch", "x compiled", *(f"x {name}" for name in others), "GF/s", "GB/s"]
        sizes = [max(len(column), 7) for column in columns]

        def line(label: str, cells: Sequence[str], sizes: Sequence[int] = sizes) -> str:
            padded = (cell.rjust(size) for cell, size in zip(cells, sizes, strict=False))
            return f"{label.ljust(label_width)}  {'  '.join(padded)}".rstrip()

        if headed != (op, dtype):
            headed = (op, dtype)
            lines += ["", line(f"{op}, {dtype}", columns), line("", ["ms", "ms", "", "", "ms", "ms"])]
            lines.append("-" * (label_width + sum(sizes) + 2 * len(sizes)))
        lines.append(group)
        for row in members:
            label = f"  {row.shape.ljust(shape_width)}  {row.note}"
            if row.error is not None:
                lines.append(line(label, []) + f"  WRONG, not timed: {row.error}")
                continue
            cells = [milliseconds(row.seconds["ours"]), milliseconds(row.bound), f"{row.fraction:.0%}", megabytes(row)]
            cells += [milliseconds(row.seconds.get(name)) for name in ("torch", "compiled", *others)]
            cells += [times(row.speedup(name)) for name in ("torch", "compiled", *others)]
            lines.append(line(label, [*cells, f"{row.gflops:.1f}", f"{row.gbytes:.1f}"]))
        if len(members) == 1:
            continue
        means = [geometric_mean(row.speedup(name) for row in members) for name in ("torch", "compiled", *others)]
        lines.append(line("  geometric mean", [""] * (6 + len(others)) + [*map(times, means)]))
    return "\n".join(lines[1:])


def other_contenders(rows: Sequence[Row], op: str) -> list[str]:
    """What an op is measured against beside torch's plain and compiled code."""
    return list(dict.fromkeys(name for row in rows if row.op == op for name in row.others))


def served_by(rows: Sequence[Row]) -> str:
    """Which backends ours ran on, and how many rows each served."""
    served = [row.backend for row in rows if row.backend]
    return ", ".join(f"{name} ({served.count(name)} rows)" for name in dict.fromkeys(served)) or "none"


def gaps(rows: Sequence[Row]) -> list[str]:
    """One line per reason why a contender has no time."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for key in row.missing.items():
            counts[key] = counts.get(key, 0) + 1
    return [f"{name}: {reason} ({count} of {len(rows)} rows)" for (name, reason), count in counts.items()]


def _rates(ceilings: Ceilings) -> dict[str, dict[str, float]]:
    return {
        "gemm_gflops": {name: rate / 1e9 for name, rate in ceilings.gemm.items()},
        "memory_gbytes": {str(size): rate / 1e9 for size, rate in ceilings.memory.items()},
    }


def latency_lines(rows: Sequence[Row]) -> list[str]:
    """A line per row and contender with its percentiles in milliseconds."""
    lines = []
    for row in rows:
        for name, percentiles in row.latency.items():
            cells = ", ".join(f"{percent} {milliseconds(taken)}" for percent, taken in percentiles.items())
            lines.append(f"  {row.op} {row.group} {row.shape} {row.setting}, {name}: {cells}")
    return ["Latency of single calls, ms:", *lines] if lines else []


def memory_lines(rows: Sequence[Row]) -> list[str]:
    """A line per op: the bytes of its rows at the peak and those that autograd keeps, ours and torch's."""
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        cells = []
        for what in ("peak", "kept"):
            both = [row.memory for row in rows if row.op == op and all(what in taken for taken in row.memory.values())]
            ours, torchs = (sum(taken[who][what] for taken in both if len(taken) > 1) for who in ("ours", "torch"))
            if torchs:
                cells.append(f"{what} {ours / torchs:.0%} of torch's ({ours / 1e6:.3g} of {torchs / 1e6:.3g} MB)")
        if cells:
            lines.append(f"  {op}: {', '.join(cells)}")
    return ["Memory beyond the inputs, summed over an op's rows:", *lines] if lines else []


def save_json(
    folder: Path,
    rows: Sequence[Row],
    baselines: dict[str, str],
    machine: dict[str, Any],
    ceilings: Mapping[int, Ceilings],
    when: datetime,
    changes: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Path]:
    """Write ``<op>-<timestamp>.json`` for each op, and all of them as ``latest.json``: op -> the file."""
    head: dict[str, Any] = {
        "when": when.isoformat(timespec="seconds"),
        "machine": machine,
        **_rates(next(iter(ceilings.values()))),
        "ceilings_by_threads": {str(threads): _rates(reached) for threads, reached in ceilings.items()},
    }
    if changes:
        head["changes"] = changes
    paths, everything = {}, {}
    for op, baseline in baselines.items():
        content = {"baseline": baseline, "rows": [row.as_json() for row in rows if row.op == op]}
        everything[op] = content
        paths[op] = folder / f"{op}-{when:%Y%m%d-%H%M%S}.json"
        paths[op].write_text(json.dumps({"op": op, **head, **content}, indent=1) + "\n")
    (folder / "latest.json").write_text(json.dumps({**head, "ops": everything}, indent=1) + "\n")
    return paths


def markdown_table(
    rows: Sequence[Row], baselines: dict[str, str], machine: dict[str, Any], ceilings: Ceilings, when: datetime
) -> str:
    """The README's section: geometric means by group."""
    dtypes = list(dict.fromkeys(row.setting for row in rows))
    groups = grouped(rows)
    lines = [
        f"{caption(machine)}. {when:%Y-%m-%d}. Measured with it: {ceilings}. Backend: {served_by(rows)}.",
        f"Times faster, geometric mean over the shapes of a row; in brackets the range. {BOUND}",
    ]
    for op, baseline in baselines.items():
        ours = [row for row in rows if row.op == op]
        heads = [f"{dtype} over {other}" for dtype in dtypes for other in (baseline, "compiled eager")]
        lines += ["", f"| {op} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for group in dict.fromkeys(row.group for row in ours):
            cells = []
            for dtype in dtypes:
                members = groups.get((op, dtype, group), [])
                cells += [_mean_and_range([row.speedup(name) for row in members]) for name in ("torch", "compiled")]
            lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown_rows(
    rows: Sequence[Row], baselines: dict[str, str], machine: dict[str, Any], ceilings: Ceilings, when: datetime
) -> str:
    """A page with every row."""
    lines = [
        "# Measured, every shape",
        "",
        "Written by `python -m mmkernels bench`. "
        f"{caption(machine)}. {when:%Y-%m-%d}. Measured with it: {ceilings}. {BOUND}",
    ]
    for op, baseline in baselines.items():
        names = ("torch", "compiled", *other_contenders(rows, op))
        heads = ["", "shape", "dtype", "ours", "bound", "of bound", "MB", baseline, "compiled eager", *names[2:]]
        heads += ["times faster", "than compiled", *(f"than {name}" for name in names[2:]), "GF/s", "GB/s"]
        lines += ["", f"## {op}", "", f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
        for row in rows:
            if row.op != op or row.error is not None:
                continue
            seconds = [row.seconds["ours"], row.bound, *(row.seconds.get(name) for name in names)]
            mine, bound, *others = ("–" if s is None else f"{milliseconds(s)} ms" for s in seconds)
            cells = [row.group, f"{row.shape} ({row.note})", row.setting, mine, bound, f"{row.fraction:.0%}"]
            cells += [megabytes(row), *others, *(times(row.speedup(name)) for name in names)]
            cells += [f"{row.gflops:.0f}", f"{row.gbytes:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_range(ratios: Sequence[float | None]) -> str:
    there = [r for r in ratios if r is not None]
    mean = geometric_mean(there)
    if mean is None:
        return "–"
    return f"**{times(mean)}**" + (f" ({times(min(there))} – {times(max(there))})" if len(there) > 1 else "")


def update_readme(readme: Path, table: str) -> None:
    """Put the table between the README's two markers; everything else stays as it is."""
    text = readme.read_text()
    if text.count(README_BEGIN) != 1 or text.count(README_END) != 1:
        raise ValueError(f"{readme}: expected one {README_BEGIN!r} and one {README_END!r}")
    before, rest = text.split(README_BEGIN)
    _, after = rest.split(README_END)
    readme.write_text(f"{before}{README_BEGIN}\n{table}\n{README_END}{after}")
