"""A run as one page that needs nothing else: no network, no folder beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

from .compare import Change
from .engine import Row
from .machine import Ceilings, caption
from .report import BOUND, geometric_mean, milliseconds, other_contenders, served_by, times
from .summary import against, describe, summarize
from .svg import Line, Point, decades, plot

CONTENDERS = ("ours", "torch", "compiled")


def page(
    rows: Sequence[Row],
    baselines: Mapping[str, str],
    machine: Mapping[str, Any],
    ceilings: Mapping[int, Ceilings],
    when: datetime,
    changes: Sequence[Change] = (),
) -> str:
    """The whole page."""
    parts = {
        "title": f"mmkernels on {escape(machine['machine']['cpu'])}",
        "subtitle": f"{when:%Y-%m-%d %H:%M}. {escape(caption(dict(machine)))}. {len(rows)} rows.",
        "summary": _summary(rows, baselines) + _changes(changes),
        "choices": "".join(_choice(name, values) for name, values in _choices(rows).items()),
        "table": _table(rows),
        "bound": escape(BOUND),
        "plots": "".join(_plots(op, [row for row in rows if row.op == op], ceilings) for op in baselines),
        "memory": _memory(rows),
        "machine": _machine(rows, machine, ceilings),
    }
    text = files("mmkernels.bench").joinpath("page.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        text = text.replace(f"<!--{name}-->", content)
    return text


# --- summary ----------------------------------------------------------------------------------------------------------


def _summary(rows: Sequence[Row], baselines: Mapping[str, str]) -> str:
    found = summarize(rows)
    cards = [
        ("good", len(found.ahead), "ops ahead of the best of torch"),
        ("", len(found.par), "at par with it"),
        ("bad" if found.behind else "", len(found.behind), "behind it"),
        ("bad" if found.wrong else "", len(found.wrong), "wrong results"),
    ]
    out = ['<div class="cards">']
    out += [f'<div class="card"><b class="{kind}">{count}</b>{what}</div>' for kind, count, what in cards]
    out.append("</div>")
    if found.worst is not None:
        worst = f"{describe(found.worst)}: {against(found.worst, baselines[found.worst.op])}"
        out.append(f"<p><b>Worst row</b> {escape(worst)}.</p>")
    out += [f'<p class="bad">Wrong: {escape(describe(row))}: {escape(row.error or "")}</p>' for row in found.wrong]
    means = {**found.ahead, **found.par, **found.behind}
    if means:
        out.append('<p class="soft">Times faster than the best of torch, mean of an op\'s rows; the mark is torch.</p>')
        out.append('<div class="bars">')
        most = max(*means.values(), 1.0)
        for op, mean in means.items():
            out.append(f"<span>{escape(op)}</span>")
            out.append(f'<span class="bar"><i style="width:{100 * mean / most:.1f}%"></i>')
            out.append(f'<em style="left:{100 / most:.1f}%"></em></span><span class="number">{times(mean)}</span>')
        out.append("</div>")
    return "".join(out)


def _changes(changes: Sequence[Change]) -> str:
    if not changes:
        return ""
    ours = times(geometric_mean(change.ratio for change in changes))
    torchs = times(geometric_mean(change.torch for change in changes))
    lines = ["<h2>Compared with the earlier run</h2>"]
    lines.append(f"<p>{ours} as fast over {len(changes)} rows; torch itself {torchs}.</p><dl>")
    shown = changes if len(changes) <= 10 else [*changes[:5], *changes[-5:]]
    for change in shown:
        seconds = f"{milliseconds(change.before)} → {milliseconds(change.now)} ms"
        lines.append(f"<dt>{times(change.ratio)}</dt><dd>{escape(change.op)} {escape(change.row)}: {seconds}</dd>")
    return "".join([*lines, "</dl>"])


# --- table ------------------------------------------------------------------------------------------------------------


def _choices(rows: Sequence[Row]) -> dict[str, list[str]]:
    return {
        "op": sorted({row.op for row in rows}),
        "dtype": list(dict.fromkeys(row.setting for row in rows)),
        "pass": list(dict.fromkeys(_pass(row) for row in rows)),
    }


def _choice(name: str, values: Sequence[str]) -> str:
    options = "".join(f"<option>{escape(value)}</option>" for value in values)
    return f'<label>{name} <select name="{name}"><option value="">all</option>{options}</select></label>'


def _pass(row: Row) -> str:
    return "training" if row.training else "forward"


def _table(rows: Sequence[Row]) -> str:
    others = list(dict.fromkeys(name for op in {row.op for row in rows} for name in other_contenders(rows, op)))
    columns = ["op", "group", "shape", "note", "dtype"]
    numbers = ["× torch", "ours ms", "torch ms", "compiled ms", "× compiled", *(f"× {name}" for name in others)]
    numbers += ["of bound", "GF/s", "GB/s"]
    remembered = any(row.memory for row in rows)
    late = any(row.latency for row in rows)
    numbers += ["peak MB", "torch peak MB", "kept MB", "torch kept MB"] if remembered else []
    numbers += ["p50 ms", "p90 ms", "p99 ms", "torch p99 ms"] if late else []
    heads = [f'<th scope="col"><button type="button">{name}</button></th>' for name in columns]
    heads += [f'<th scope="col" class="number"><button type="button">{escape(name)}</button></th>' for name in numbers]
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(t)}</td>" for t in (row.op, row.group, row.shape, row.note, row.setting))
        values = _values(row, others)
        values += _memory_values(row) if remembered else []
        values += _latency_values(row) if late else []
        if row.error is not None:
            values[1] = (None, "WRONG")
        cells += "".join(_cell(value, shown) for value, shown in values)
        data = {"op": row.op, "dtype": row.setting, "pass": _pass(row)}
        attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
        kind = "" if row.error is None else ' class="bad"'
        body.append(f"<tr{attributes}{kind}>{cells}</tr>")
    return f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody>"


Shown = tuple[float | None, str]  # what is sorted by, and how it reads


def _cell(value: float | None, shown: str) -> str:
    by = "" if value is None else f"{value:.6g}"
    return f'<td class="number" data-v="{by}">{escape(shown)}</td>'


def _values(row: Row, others: Sequence[str]) -> list[Shown]:
    values: list[Shown] = [(row.speedup("torch"), times(row.speedup("torch")))]
    values += [(row.seconds.get(name), milliseconds(row.seconds.get(name))) for name in CONTENDERS]
    values += [(row.speedup(name), times(row.speedup(name))) for name in ("compiled", *others)]
    if "ours" not in row.seconds:
        return [*values, *[(None, "-")] * 3]
    values += [(row.fraction, f"{row.fraction:.0%}"), (row.gflops, f"{row.gflops:.1f}")]
    return [*values, (row.gbytes, f"{row.gbytes:.1f}")]


def _memory_values(row: Row) -> list[Shown]:
    taken = [row.memory.get(who, {}).get(what) for what in ("peak", "kept") for who in ("ours", "torch")]
    return [(value, "-" if value is None else f"{value / 1e6:.3g}") for value in taken]


def _latency_values(row: Row) -> list[Shown]:
    wanted = [("ours", "p50"), ("ours", "p90"), ("ours", "p99"), ("torch", "p99")]
    taken = [row.latency.get(who, {}).get(percent) for who, percent in wanted]
    return [(value, milliseconds(value)) for value in taken]


# --- plots ------------------------------------------------------------------------------------------------------------


def _plots(op: str, rows: Sequence[Row], ceilings: Mapping[int, Ceilings]) -> str:
    settings = list(dict.fromkeys(row.setting for row in rows))
    figures = [_time_plot([row for row in rows if row.setting == one], one) for one in settings]
    figures += [_roofline([row for row in rows if row.setting == one], one, ceilings) for one in settings]
    drawn = "".join(figures)
    return f'<details><summary>{escape(op)}</summary><div class="plots">{drawn}</div></details>' if drawn else ""


def _time_plot(rows: Sequence[Row], setting: str) -> str:
    points, lines = [], []
    for name in reversed(CONTENDERS):  # ours on top
        series: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for row in rows:
            if name in row.seconds and row.length > 0:
                place = row.length, row.seconds[name] * 1e3
                series.setdefault((row.series, row.training), []).append(place)
                label = f"{name}, {row.group}, {row.shape}: {milliseconds(row.seconds[name])} ms"
                points.append(Point(*place, f"{name} {_pass(row)}", label))
        lines += [Line(sorted(set(places)), name) for places in series.values() if len(set(places)) > 1]
    if not points:
        return ""
    drawn = plot(points, lines, "length: keys, tokens or rows", "ms")
    return f'<figure class="time"><figcaption>Time, {escape(setting)}</figcaption>{drawn}</figure>'


def _roofline(rows: Sequence[Row], setting: str, ceilings: Mapping[int, Ceilings]) -> str:
    there = [row for row in rows if row.flops > 0 and row.bytes > 0]
    points = [
        Point(
            row.flops / row.bytes,
            row.flops / row.seconds[name] / 1e9,
            f"{name} {'forward' if name == 'ours' else 'training'}",  # torch's are hollow here
            f"{name}, {row.group}, {row.shape}: {row.flops / row.seconds[name] / 1e9:.1f} GF/s",
        )
        for name in ("torch", "ours")
        for row in there
        if name in row.seconds
    ]
    if not points:
        return ""
    reached = ceilings.get(there[0].threads) or next(iter(ceilings.values()))
    near, far = max(reached.memory.values()), min(reached.memory.values())
    peak = there[0].peak
    span = decades([*(point.x for point in points), peak / near, peak / far])
    roofs = [_roof(peak, rate, span) for rate in dict.fromkeys((far, near))]
    drawn = plot(points, roofs, "floating operations per byte", "GF/s")
    words = f"Roofline, {setting}: {peak / 1e9:.0f} GF/s; {near / 1e9:.0f} GB/s near and {far / 1e9:.0f} far"
    return f'<figure class="roofline"><figcaption>{escape(words)}</figcaption>{drawn}</figure>'


def _roof(peak: float, rate: float, span: tuple[int, int]) -> Line:
    """What the machine reaches by the operations per byte, from one power of ten to another: a slope and a level,
    straight on logarithmic axes."""
    left, right = (10.0**power for power in span)
    return Line([(left, left * rate / 1e9), (peak / rate, peak / 1e9), (right, peak / 1e9)], "roof")


# --- memory and machine -----------------------------------------------------------------------------------------------


def _memory(rows: Sequence[Row]) -> str:
    if not any(row.memory for row in rows):
        return '<p class="soft">Not measured: <code>--memory</code> asks for it.</p>'
    out = ['<p class="soft">Sums over an op\'s rows, ours (first bar) against torch.</p>']
    for what, title in (("peak", "At the peak"), ("kept", "Kept by autograd from forward to backward")):
        lines = []
        for op in sorted({row.op for row in rows}):
            both = [row.memory for row in rows if row.op == op and len(row.memory) == 2]
            both = [taken for taken in both if all(what in one for one in taken.values())]
            ours, torchs = (sum(taken[who][what] for taken in both) for who in ("ours", "torch"))
            most = max(ours, torchs)
            if most:
                bars = "".join(
                    f'<span class="bar"><i{kind} style="width:{100 * size / most:.1f}%"></i></span>'
                    for kind, size in (("", ours), (' class="torch"', torchs))
                )
                lines.append(f'<span>{escape(op)}</span><span>{bars}</span><span class="number">')
                lines.append(f"{ours / 1e6:.3g} of {torchs / 1e6:.3g} MB</span>")
        if lines:
            out.append(f'<h3>{title}</h3><div class="bars">{"".join(lines)}</div>')
    return "".join(out)


def _machine(rows: Sequence[Row], machine: Mapping[str, Any], ceilings: Mapping[int, Ceilings]) -> str:
    facts = {name: str(value) for name, value in machine["machine"].items() if value not in (None, [], False)}
    facts |= {name: str(value) for name, value in machine.get("versions", {}).items() if value is not None}
    native = machine.get("native", {})
    facts["instruction set"] = str(native.get("isa"))
    facts["ours ran on"] = served_by(rows)
    for threads, reached in ceilings.items():
        facts[f"reached on {threads} thread{'s' * (threads > 1)}"] = str(reached)
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>"
