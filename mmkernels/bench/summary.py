"""A run in words: which ops are ahead of plain torch, at par and behind, and the worst row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .engine import Row
from .report import geometric_mean, times

PAR = 0.05  # this near to torch is neither faster nor slower


@dataclass
class Summary:
    """Each op's mean speed-up over torch's best eager code, sorted into three; the greatest first."""

    ahead: dict[str, float] = field(default_factory=dict)
    par: dict[str, float] = field(default_factory=dict)
    behind: dict[str, float] = field(default_factory=dict)
    worst: Row | None = None  # of the rows that were timed
    wrong: list[Row] = field(default_factory=list)


def summarize(rows: Sequence[Row]) -> Summary:
    summary = Summary(wrong=[row for row in rows if row.error is not None])
    means = {op: geometric_mean(row.speedup("torch") for row in rows if row.op == op) for op in {r.op for r in rows}}
    for op, mean in sorted(means.items(), key=lambda item: (-(item[1] or 0.0), item[0])):
        if mean is not None:
            place = summary.ahead if mean > 1 + PAR else summary.behind if mean < 1 / (1 + PAR) else summary.par
            place[op] = mean
    timed = [(speedup, row) for row in rows if (speedup := row.speedup("torch")) is not None]
    summary.worst = min(timed, key=lambda pair: pair[0])[1] if timed else None
    return summary


def describe(row: Row) -> str:
    """A row by what tells it from the others."""
    return f"{row.op}, {row.group}, {row.shape} ({row.note}), {row.setting}"


def against(row: Row, baseline: str) -> str:
    """How the row stands to the baseline, whichever of them is faster."""
    speedup = row.speedup("torch")
    if speedup is None:
        return "not compared"
    if speedup >= 1:
        return f"{times(speedup)} as fast as {baseline}"
    return f"{times(speedup)} as fast as {baseline}, which takes {1 - speedup:.0%} less time"


def words(rows: Sequence[Row], baselines: dict[str, str]) -> list[str]:
    """The lines at the end of a run."""
    summary = summarize(rows)
    places = (("ahead", summary.ahead), ("at par", summary.par), ("behind", summary.behind))
    count = sum(len(ops) for _, ops in places)
    lines = []
    if count:
        counts = ", ".join(f"{len(ops)} {place}" for place, ops in places)
        lines.append(f"{count} op{'s' * (count > 1)} against the best of plain torch (mean of an op's rows): {counts}.")
    for place, ops in places:
        if ops:
            lines.append(f"  {place}: " + ", ".join(f"{op} {times(mean)}" for op, mean in ops.items()))
    if summary.worst is not None:
        lines.append(f"Worst row: {describe(summary.worst)}: {against(summary.worst, baselines[summary.worst.op])}.")
    for row in summary.wrong:
        lines.append(f"WRONG: {describe(row)}: {row.error}")
    return lines
