"""What a run shows while it goes on: a bar that ends by the budget, and a way out that loses nothing."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Whether Ctrl-C was pressed. What runs is left at once by a KeyboardInterrupt; where foreign code swallows that,
    `pressed` still says it."""

    pressed = False

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        raise KeyboardInterrupt

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Inside, Ctrl-C sets `pressed` and ends the block, quietly."""
        try:
            before = signal.signal(signal.SIGINT, self._press)
        except ValueError:  # not the main thread: there is no handler to set
            before = None
        try:
            yield
        except KeyboardInterrupt:
            self.pressed = True
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)


def span(seconds: float) -> str:
    """As a clock shows it, 4:05."""
    whole = max(round(seconds), 0)
    return f"{whole // 60}:{whole % 60:02d}"


def remaining(done: int, rows: int, elapsed: float, measuring: float, budget: float) -> float:
    """Seconds until the end: what the rows to come take at the pace of those done, and never past the budget."""
    left = max(budget - elapsed, 0.0)
    return min(left, measuring / done * (rows - done)) if done else left


class Progress:
    """The bar of a run of `rows` rows that began at `start`, of which the first row begins now."""

    def __init__(self, rows: int, start: float, budget: float) -> None:
        from tqdm import tqdm

        self.rows, self.start, self.budget, self.first = rows, start, budget, time.perf_counter()
        self.terminal = sys.stderr.isatty()
        every = 0.1 if self.terminal else 15.0  # a log file needs a line now and then, not ten a second
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"
        self.bar: Any = tqdm(total=rows, dynamic_ncols=True, mininterval=every, bar_format=form)

    def begin(self, label: str) -> None:
        now = time.perf_counter()
        left = remaining(self.bar.n, self.rows, now - self.start, now - self.first, self.budget)
        self.bar.set_postfix_str(f"{span(now - self.start)} gone, {span(left)} to go", refresh=False)
        self.bar.set_description(label, refresh=self.terminal)

    def end(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
