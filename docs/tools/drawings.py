"""The drawings of how kernels cut their work into tiles: `python docs/tools/drawings.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

PICTURES = Path(__file__).parents[1] / "pictures"
PLAIN, DONE, NOW, KEPT = "#eef2f7", "#bcd4ee", "#e8793a", "#8fcf9f"  # to come, passed, in work, kept all the while
INK = "#1f2933"


class Drawing:
    """Boxes, words and arrows on white."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(self, x: int, y: int, width: int, height: int, fill: str = PLAIN, words: str = "") -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{INK}"/>')
        if words:
            self.words(x + width // 2, y + height // 2 + 5, words, "middle")

    def words(self, x: int, y: int, words: str, anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>')

    def arrow(self, x1: int, y1: int, x2: int, y2: int) -> None:
        line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"'
        self.parts.append(f'{line} stroke="{INK}" stroke-width="2" marker-end="url(#head)"/>')

    def svg(self, title: str) -> str:
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = '<marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f'<defs>{head}<path d="M0,0 L7,3 L0,6 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


def attention() -> str:
    """A task's queries against blocks of keys."""
    d = Drawing(700, 330)
    left, top, block, band = 130, 70, 84, 60
    d.words(left, 24, "keys, in blocks of 128; K and V of a block come from afar once")
    for i in range(4):
        d.box(left + i * block, 36, block, 22, NOW if i == 2 else PLAIN, f"K, V {i + 1}")
    d.words(10, top + 18, "queries,")
    d.words(10, top + 36, "up to 96")
    d.words(10, top + 54, "for a task")
    for row in range(3):
        for column in range(4):
            fill = PLAIN if row != 1 else (DONE if column < 2 else NOW if column == 2 else PLAIN)
            d.box(left + column * block, top + row * band, block, band, fill)
    d.words(left + 2 * block + block // 2, top + band + 35, "scores", "middle")
    d.arrow(left + 10, top + 3 * band + 18, left + 4 * block - 10, top + 3 * band + 18)
    d.words(left, top + 3 * band + 42, "a task walks over the keys; a tile of scores lives in cache and is then gone")
    d.box(left + 4 * block + 24, top + band, 200, band, KEPT, "maximum, sum, output")
    d.words(left + 4 * block + 24, top + 2 * band + 20, "kept along the whole walk")
    return d.svg("A task of attention: some queries walk over blocks of keys")


def concatenation() -> str:
    """A block of rows of all sources against the weight's columns."""
    d = Drawing(700, 350)
    left, top = 20, 60
    widths = {"x₁": 150, "x₂": 80, "x₃": 110}
    d.words(left, 24, "sources, each where it lies")
    x = left
    for i, (name, width) in enumerate(widths.items()):
        d.box(x, top, width, 110, PLAIN)
        d.box(x, top + 36, width, 36, DONE if i == 0 else NOW if i == 1 else PLAIN, name)
        x += width + 12
    d.words(left, top + 134, "a block of 96 rows of every source")
    y = 226
    x = left
    for i, width in enumerate(widths.values()):
        d.box(x, y, width, 60, DONE if i == 0 else NOW if i == 1 else PLAIN, f"W{'₁₂₃'[i]}")
        x += width + 12
    d.words(left, y + 84, "the same columns of the weight, packed once: a panel stays in the level-1 cache")
    d.arrow(x + 6, top + 54, x + 56, top + 54)
    d.box(x + 66, top + 24, 220, 60, KEPT, "sum over the sources, float32")
    d.arrow(x + 176, top + 90, x + 176, top + 128)
    d.box(x + 66, top + 136, 220, 40, PLAIN, "bias, activation, gate: y")
    d.words(x + 66, top + 200, "while the tile is in cache")
    return d.svg("concat_linear: the product of a concatenation that is never built")


def two_directions() -> str:
    """Blocks of scores, used by rows and by columns."""
    d = Drawing(740, 440)
    left, top, block = 150, 60, 80
    d.words(left, 24, "the shorter side, such as text")
    d.words(10, top + 20, "the longer side,")
    d.words(10, top + 38, "such as an image,")
    d.words(10, top + 56, "in strips")
    for row in range(4):
        for column in range(3):
            done = row == 0 or (row == 1 and column < 1)
            fill = NOW if (row, column) == (1, 1) else DONE if done else PLAIN
            d.box(left + column * block, top + row * block, block, block, fill)
    d.words(left + block + block // 2 + 4, top + block + 38, "96 × 96", "middle")
    right = left + 3 * block
    d.arrow(left + 10, top + block + 58, right + 26, top + block + 58)
    d.box(right + 36, top + block + 10, 280, 46, KEPT, "sums of rows: complete after one walk")
    d.words(right + 36, top + block + 78, "image to text")
    d.arrow(left + block + 7, top + 10, left + block + 7, top + 4 * block + 14)
    d.box(left, top + 4 * block + 18, 3 * block, 24, KEPT, "sums of columns")
    d.words(right + 20, top + 4 * block + 36, "text to image: they run along the strip")
    return d.svg("bidirectional_cross_attention: a block of scores is formed once and used twice")


DRAWINGS: dict[str, Callable[[], str]] = {
    "attention_tiles": attention,
    "concat_tiles": concatenation,
    "bidirectional_tiles": two_directions,
}


def main() -> int:
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        path, drawing = PICTURES / f"{name}.svg", draw()
        if not path.exists() or path.read_text(encoding="utf-8") != drawing:
            path.write_text(drawing, encoding="utf-8")
            print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
