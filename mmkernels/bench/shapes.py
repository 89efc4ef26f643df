"""Which workloads of a suite are measured: ``--shapes`` and ``--latency``.

A preset, a file, or sizes such as ``B=2,H=8,Lq=1024,Lk=77,D=64``; sizes that are not named are those of the op's first
workload that has the named ones.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .suite import Suite, Workload

PRESETS = {
    "default": "what this device is measured with",
    "quick": "the rows of --quick",
    "large": "those that keep a GPU busy, wherever it runs",
    "lengths": "the op's first workload at 1, 2, 4 and 8 times its length",
}
FACTORS = (1, 2, 4, 8)

# The letters that papers have for a size, and the fields that hold it, the first that a workload has.
LETTERS = {
    "B": ("batch", "rows", "pairs"),
    "N": ("rows", "pairs", "batch"),
    "H": ("heads",),
    "Hk": ("kv_heads",),
    "Lq": ("queries", "x"),
    "Lk": ("keys", "y"),
    "L": ("length", "queries"),
    "D": ("dim", "width"),
    "C": ("features",),
    "M": ("modalities",),
    "V": ("classes",),
    "R": ("rank",),
}

Groups = Mapping[str, Sequence[Workload]]


def field_names(work: Workload) -> list[str]:
    """The sizes and options of a workload, without what every workload has."""
    common = {f.name for f in fields(Workload)}
    return [f.name for f in fields(work) if f.name not in common]


def _field(work: Workload, name: str) -> str | None:
    there = field_names(work)
    return next((candidate for candidate in LETTERS.get(name, (name,)) if candidate in there), None)


def _value(work: Workload, name: str, text: str) -> object:
    """The text as the field's value, by the type of what the field holds."""
    held = getattr(work, name)
    allowed = _literals(typing.get_type_hints(type(work)).get(name))
    if allowed:
        for one in allowed:
            if text == written(one):
                return one
        raise ValueError(f"{name}: expected {', '.join(map(written, allowed))}; got {text}")
    try:
        if isinstance(held, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(held, tuple):
            parts = [] if text == "none" else text.split("+")
            if any(isinstance(one, tuple) for one in held):
                return tuple(tuple(int(side) for side in part.split("x")) for part in parts)
            return tuple(int(part) for part in parts)
        return type(held)(text)
    except (KeyError, ValueError):
        expected = "true or false" if isinstance(held, bool) else f"a value such as {written(held)}"
        raise ValueError(f"{name}: expected {expected}; got {text}") from None


def _literals(hint: Any) -> tuple[object, ...]:
    """What a field of this type may be, where its type lists that."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    parts = typing.get_args(hint)
    if type(None) in parts:
        return (*(value for part in parts for value in _literals(part)), None)
    return ()


def written(value: object) -> str:
    """A field's value as `--shapes` takes it; an empty one is "none"."""
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, tuple):
        return "+".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def sized(work: Workload, sizes: str) -> Workload | None:
    """The workload with these sizes, None where it has no such field."""
    changes: dict[str, Any] = {}
    for part in sizes.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not (name and equals and text):
            raise ValueError(f"expected NAME=VALUE,...; got {part.strip() or sizes!r}")
        field = _field(work, name)
        if field is None:
            return None
        changes[field] = _value(work, field, text)
    return replace(work, note="given", quick=True, gpu=False, **changes)


def _every(groups: Groups) -> Iterator[Workload]:
    return (work for workloads in groups.values() for work in workloads)


def _filtered(groups: Groups, keep: Callable[[Workload], Workload | None]) -> dict[str, list[Workload]]:
    found = {name: [new for work in works if (new := keep(work)) is not None] for name, works in groups.items()}
    return {name: list(dict.fromkeys(works)) for name, works in found.items() if works}


def by_length(work: Workload) -> list[Workload]:
    """The workload at several lengths."""
    name = work.length_field()
    if name is None:
        return []

    def times(factor: int) -> Any:
        held = getattr(work, name)
        return tuple(factor * part for part in held) if isinstance(held, tuple) else factor * held

    return [replace(work, quick=True, gpu=False, **{name: times(factor)}) for factor in FACTORS]


def specifications(text: str) -> list[str]:
    """The sizes that `--shapes` names, one string a shape: given themselves, or the lines of a file.

    Raises:
        ValueError: it is neither, nor a preset.
    """
    if text in PRESETS or not text:
        return []
    if "=" in text:
        return [part for part in text.split(";") if part.strip()]
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"expected {', '.join(PRESETS)}, a file, or sizes such as B=2,H=8,Lq=1024; got {text!r}")
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    if not any(lines):
        raise ValueError(f"expected a line of sizes such as B=2,H=8,Lq=1024; {path} has none")
    return [line for line in lines if line]


def of_suite(suite: Suite, shapes: str, given: Sequence[str]) -> Suite:
    """The suite with the workloads that were asked for, perhaps none."""
    if given:
        found: list[dict[str, list[Workload]]] = []
        for groups in (suite.forward, suite.training):
            shaped = (
                next((s for work in _every(groups) if (s := sized(work, one)) is not None), None) for one in given
            )
            works = [work for work in shaped if work is not None]
            name = "given" if groups is suite.forward else "given, training"
            found.append({name: works} if works else {})
        return Suite(suite.baseline, *found)
    if shapes == "lengths":
        forward, training = (next(_every(groups), None) for groups in (suite.forward, suite.training))
        runs = ("by length", forward), ("by length, training", training)
        swept = [{name: works} if work and (works := by_length(work)) else {} for name, work in runs]
        return Suite(suite.baseline, *swept)

    def keep(work: Workload) -> Workload | None:
        if shapes == "large":
            return replace(work, gpu=False) if work.gpu else None
        return work if shapes != "quick" or work.quick else None

    return Suite(suite.baseline, _filtered(suite.forward, keep), _filtered(suite.training, keep))


def of_one(suite: Suite) -> Suite:
    """The suite with a batch, or as many rows, of 1; what has neither stays as it is."""

    def single(work: Workload) -> Workload:
        name = next((name for name in ("batch", "rows") if name in field_names(work)), None)
        one: dict[str, Any] = {} if name is None else {name: 1}
        return replace(work, **one)

    return Suite(suite.baseline, _filtered(suite.forward, single), _filtered(suite.training, single))


def fields_of(suites: Mapping[str, Suite]) -> str:
    """Which sizes each op takes, for who named others."""
    lines = []
    for op, suite in suites.items():
        work = next(_every(suite.forward), None)
        if work is not None:
            lines.append(f"  {op}: " + ",".join(f"{name}={written(getattr(work, name))}" for name in field_names(work)))
    return "\n".join(lines)
