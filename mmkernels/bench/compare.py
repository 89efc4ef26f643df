"""A run beside an earlier one: which rows became faster and which slower."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .engine import Row
from .report import geometric_mean, milliseconds, times

NOISE = 0.05  # of a time: less is no change

Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True)
class Change:
    """A row of both runs; a ratio above 1 is faster now."""

    op: str
    row: str
    before: float  # seconds of ours
    now: float
    ratio: float
    torch: float | None  # the same ratio of torch's times: what the machine alone changed


@dataclass(frozen=True)
class Baseline:
    """An earlier run, read from the file that it left."""

    path: Path
    cpu: str
    when: str
    rows: Mapping[Key, Mapping[str, Any]]


def _key(op: str, row: Mapping[str, Any], threads: int) -> Key:
    return (op, row["group"], row["shape"], row["note"], row["dtype"], row.get("threads") or threads)


def read(path: Path) -> Baseline:
    """The run that left `latest.json` or a file of one op.

    Raises:
        ValueError: the file is not there, or nothing that a run leaves.
    """
    try:
        content = json.loads(path.read_text())
        ops = content["ops"] if "ops" in content else {content["op"]: content}
        machine = content["machine"]["machine"]
        rows = {_key(op, row, machine["threads"]): row for op, of_op in ops.items() for row in of_op["rows"]}
        return Baseline(path, machine["cpu"], content["when"], rows)
    except OSError as error:
        raise ValueError(f"expected a file that a run left; {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = "a file that a run left, such as bench_results/latest.json"
        raise ValueError(f"expected {expected}; {path} is none") from None


def changes(rows: Sequence[Row], baseline: Baseline, threads: int) -> list[Change]:
    """The rows that both runs timed, the greatest loss first."""
    found = []
    for row in rows:
        before = baseline.rows.get(_key(row.op, asdict(row), threads))
        if before is None or "ours" not in row.seconds or "ours" not in before["seconds"]:
            continue
        ratios = {
            name: before["seconds"][name] / row.seconds[name]
            for name in ("ours", "torch")
            if name in row.seconds and name in before["seconds"]
        }
        label = f"{row.group} {row.shape} {row.setting}"
        seconds = before["seconds"]["ours"], row.seconds["ours"]
        found.append(Change(row.op, label, *seconds, ratios["ours"], ratios.get("torch")))
    return sorted(found, key=lambda change: change.ratio)


def words(found: Sequence[Change], baseline: Baseline, cpu: str) -> list[str]:
    """The comparison as a reader wants it: how many rows, how much, and which."""
    if not found:
        return [f"Compared with {baseline.path}: no row in common."]
    slower = [change for change in found if change.ratio < 1 - NOISE]
    faster = [change for change in found if change.ratio > 1 + NOISE]
    mean, drift = (geometric_mean(ratios) for ratios in ([c.ratio for c in found], [c.torch for c in found]))
    lines = [
        f"Compared with {baseline.path} of {baseline.when}, {len(found)} rows: {len(faster)} faster, "
        f"{len(found) - len(faster) - len(slower)} the same within {NOISE:.0%}, {len(slower)} slower; "
        f"{times(mean)} as fast (torch itself: {times(drift)})."
    ]
    if baseline.cpu != cpu:
        lines.append(f"  That was another machine: {baseline.cpu}, not {cpu}.")
    for name, some in (("slower", slower[:10]), ("faster", faster[::-1][:10])):
        for change in some:
            seconds = f"{milliseconds(change.before)} -> {milliseconds(change.now)} ms"
            lines.append(f"  {name}: {change.op} {change.row}: {seconds}, {times(change.ratio)}")
    return lines


def below(rows: Sequence[Row], found: Sequence[Change] | None, ratio: float) -> list[str]:
    """What `--fail-below` refuses: rows slower than `ratio` times the earlier run, or torch where none was given."""
    if found is not None:
        if not found:
            return ["no row in common with the earlier run"]
        return [f"{c.op} {c.row}: {times(c.ratio)}" for c in found if c.ratio < ratio]
    speedups = [(row, row.speedup("torch")) for row in rows]
    return [
        f"{row.op} {row.group} {row.shape} {row.setting}: {times(speedup)}"
        for row, speedup in speedups
        if speedup is not None and speedup < ratio
    ]
