"""Plots with two logarithmic axes, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 10, 40
MOST_TICKS = 7


@dataclass(frozen=True)
class Point:
    """A dot; `kind` is its class on the page, such as "ours training"."""

    x: float
    y: float
    kind: str
    label: str  # shown where the pointer rests


@dataclass(frozen=True)
class Line:
    points: Sequence[tuple[float, float]]
    kind: str


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten between which the values are, at least one apart."""
    there = list(values)
    first, last = math.floor(math.log10(min(there)) + 1e-9), math.ceil(math.log10(max(there)) - 1e-9)
    return first, max(last, first + 1)


def number(value: float) -> str:
    """A power of ten as a reader has it: 1000, 0.01, 1e6."""
    return f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")


def plot(points: Sequence[Point], lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """The points and lines, all positive; the axes span the decades of both."""
    places = [(p.x, p.y) for p in points] + [place for line in lines for place in line.points]
    (x0, x1), (y0, y1) = (decades(values) for values in zip(*places, strict=True))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + wide * (math.log10(x) - x0) / (x1 - x0),
            TOP + high * (1 - (math.log10(y) - y0) / (y1 - y0)),
        )

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)} over {escape(x_name)}">']
    for power in range(x0, x1 + 1, max(1, (x1 - x0) // MOST_TICKS)):
        x, _ = at(10.0**power, 10.0**y0)
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{number(10.0**power)}</text>')
    for power in range(y0, y1 + 1, max(1, (y1 - y0) // MOST_TICKS)):
        _, y = at(10.0**x0, 10.0**power)
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(10.0**power)}</text>')
    out.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    middle = TOP + high / 2
    out.append(f'<text transform="rotate(-90 12 {middle})" x="12" y="{middle}" text-anchor="middle">')
    out.append(f"{escape(y_name)}</text>")
    for line in lines:
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*place) for place in line.points))
        out.append(f'<polyline class="{line.kind}" points="{drawn}"/>')
    for point in points:
        x, y = at(point.x, point.y)
        out.append(f'<circle class="{point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">')
        out.append(f"<title>{escape(point.label)}</title></circle>")
    return "".join([*out, "</svg>"])
