"""What `accelerate` did to a model, for reading and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal


@dataclass(frozen=True)
class Entry:
    """One module or function of the model.

    Attributes:
        path: where it is, as ``named_modules`` says it; "" is the model.
        what: its class, or the function inside of it.
        with_: the ops of this library that replace it, or would.
        status: "replaced" or "left".
        reason: why it was left; None where it was replaced.
    """

    path: str
    what: str
    with_: str
    status: Literal["replaced", "left"]
    reason: str | None = None

    def __str__(self) -> str:
        where = self.path or "(model)"
        if self.status == "replaced":
            return f"replaced  {where}: {self.what} with {self.with_}"
        return f"left      {where}: {self.what}: {self.reason}"


@dataclass
class Report:
    """Iterable over its entries; printed, one line for each of them and the counts.

    As a context manager it restores the model at the end of the block: ``with accelerate(model) as report: ...``.
    """

    entries: list[Entry]
    restore: Callable[[], object] = field(repr=False)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    @property
    def replaced(self) -> list[Entry]:
        return [e for e in self.entries if e.status == "replaced"]

    @property
    def left(self) -> list[Entry]:
        return [e for e in self.entries if e.status == "left"]

    def __str__(self) -> str:
        kinds = Counter((e.what, e.with_) for e in self.replaced)
        lines = [str(e) for e in self.entries]
        lines += [f"{count} x {what} with {with_}" for (what, with_), count in kinds.items()]
        return "\n".join([*lines, f"{len(self.replaced)} replaced, {len(self.left)} left"])

    __repr__ = __str__

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.restore()
