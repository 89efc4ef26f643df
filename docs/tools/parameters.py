"""The tables of parameters in the pages, from signatures and docstrings: `python docs/tools/parameters.py`.

A page has them between two comments, ``<!-- parameters of concat_linear: … -->`` and ``<!-- /parameters -->``; of a
module the name begins with ``nn.``. What stands between is written anew.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mmkernels as mmk

DOCS = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- parameters of ([\w.]+):[^>]*-->\n).*?(<!-- /parameters -->)", re.DOTALL)
_SIZE = (
    r"(?:\*|…|\.\.\.|[A-ZΣΠ][\w·/]*(?: ?\([^()]*\))?(?: [·]? ?[A-Z]\w*)?(?: \+ \d)?"
    r"|rank·N|\d|B or 1|[a-z]_dim|[kv]dim|sources)"
)
_SHAPE = re.compile(rf"(?<![\w`])\((?:{_SIZE},|{_SIZE}(?:, {_SIZE})+)?\)")
_SECTION = re.compile(r"^(Args|Returns|Raises|Example):$")


@dataclass
class Docstring:
    """What a docstring says beside its first line and formula."""

    parameters: dict[str, str] = field(default_factory=dict)
    returns: str = ""
    raises: str = ""
    notes: list[str] = field(default_factory=list)
    example: list[str] = field(default_factory=list)


def parse(text: str) -> Docstring:
    """A docstring in the style of this package."""
    doc, section, names = Docstring(), "", []
    paragraph: list[str] = []

    def end_paragraph() -> None:
        if paragraph and section:
            doc.notes.append(" ".join(paragraph))
        paragraph.clear()

    for line in [*inspect.cleandoc(text).splitlines(), ""]:
        if heading := _SECTION.match(line):
            end_paragraph()
            section = heading[1]
        elif not line.startswith(" "):
            if line:
                paragraph.append(line)
            else:
                end_paragraph()
        elif section == "Args":
            if entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
                names = entry[1].split(", ")
                doc.parameters.update(dict.fromkeys(names, entry[2]))
            else:
                doc.parameters.update({name: f"{doc.parameters[name]} {line.strip()}" for name in names})
        elif section == "Returns":
            doc.returns = f"{doc.returns} {line.strip()}".strip()
        elif section == "Raises":
            doc.raises = f"{doc.raises} {line.strip()}".strip()
        elif section == "Example":
            doc.example.append(line[4:])
    return doc


def type_text(annotation: Any) -> str:
    """A type as a reader says it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is typing.Literal:
        return (
            "str" if len(arguments) > 3 else " or ".join(f"`{argument!r}`".replace("'", '"') for argument in arguments)
        )
    if origin is tuple:
        return f"({', '.join(type_text(argument) for argument in arguments)})"
    if origin is not None and issubclass(origin, Sequence):
        of = type_text(arguments[0])
        return f"list of ({of})" if " or " in of else f"list of {of}"
    if annotation in (Any, inspect.Parameter.empty):
        return ""
    return "None" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def markdown(text: str) -> str:
    """A docstring's words as Markdown that can stand in a table."""
    text = re.sub(r"``(.+?)``", r"`\1`", text).replace("|", r"\|")
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else _SHAPE.sub(lambda m: f"`{m[0]}`", part).replace(" * ", r" \* ")
        for part in parts
    )


def shapes(description: str, type_name: str) -> str:
    """The shapes that the first sentence about a tensor names."""
    if "Tensor" not in type_name:
        return ""
    first = re.split(r"[;:.](?:\s|$)", description, maxsplit=1)[0]
    found = dict.fromkeys(match[0] for match in _SHAPE.finditer(first))
    return " or ".join(f"`{shape}`" for shape in found)


def _signature(of: Callable[..., Any]) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """Parameters and types; of a constructor that hands on all it gets, those of torch's class."""
    function = of.__init__ if isinstance(of, type) else of
    parameters = list(inspect.signature(of).parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        base = next(base for base in of.__mro__ if base.__module__.startswith("torch.nn"))  # type: ignore[attr-defined]
        parameters, function = list(inspect.signature(base).parameters.values()), base.__init__
    return parameters, typing.get_type_hints(function)


def _default(p: inspect.Parameter) -> str:
    """As it would be written, floats to six digits."""
    if p.default is p.empty:
        return ""
    shortened = isinstance(p.default, float) and len(repr(p.default)) > 8
    return f"{p.default:.6g}" if shortened else repr(p.default).replace("'", '"')


def _without_shape(text: str) -> str:
    """A description less the shape that it begins with, which has a column of its own."""
    return re.sub(rf"^{_SHAPE.pattern}(?:[,;.:] ?(?!or )| (?=of |with |bool|int|float))", "", text)


def _call_text(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    words, keyword_only = [], False
    for p in parameters:
        if p.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            words.append("*")
        words.append(f"{p.name}={default}" if (default := _default(p)) else p.name)
    return f"`{name}({', '.join(words)})`"


def _table(parameters: Sequence[inspect.Parameter], hints: dict[str, Any], doc: Docstring) -> list[str]:
    """The rows of the parameters, what else is to be known of the call, and what it returns and raises."""
    described = [(p, type_text(hints.get(p.name, p.empty)), doc.parameters.get(p.name, "")) for p in parameters]
    shaped = any(shapes(text, kind) for _, kind, text in described)
    typed = any(kind for _, kind, _ in described)
    head = ["name", *(["type"] if typed else []), "default", *(["shape"] if shaped else []), "meaning"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for p, kind, text in described:
        default = f"`{word}`" if (word := _default(p)) else ""
        shape = shapes(text, kind)
        meaning = markdown(_without_shape(text) if shape else text)
        cells = [f"`{p.name}`", *([kind] if typed else []), default, *([shape] if shaped else []), meaning]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{markdown(note)}\n" for note in doc.notes)]
    if doc.returns:
        lines += [f"**Returns** {markdown(doc.returns)}", ""]
    if doc.raises:
        raised = re.sub(r"(\w[\w.]*Error)", r"`\1`", doc.raises)
        lines += [f"**Raises** {raised}", ""]
    return lines


def table(of: Callable[..., Any], name: str) -> str:
    """The call, its parameters, what it returns and raises, as Markdown; of a module also what it is called with."""
    parameters, hints = _signature(of)
    doc = parse(of.__doc__ or "")
    is_module = isinstance(of, type)
    if not is_module:
        doc.raises = " ".join(filter(None, [doc.raises, "What [every op](limits.md#errors) raises."]))
    if is_module:
        for p in ("device", "dtype"):
            doc.parameters.setdefault(p, "of the parameters.")
    if wrong := {p.name for p in parameters} - set(doc.parameters):
        raise ValueError(f"{name}: its docstring does not describe {sorted(wrong)}")
    if wrong := set(doc.parameters) - {p.name for p in parameters} - ({"device", "dtype"} if is_module else set()):
        raise ValueError(f"{name}: its docstring describes {sorted(wrong)}, which it does not take")
    lines = [_call_text(f"mmkernels.{name}", parameters), "", *_table(parameters, hints, doc)]
    if isinstance(of, type):
        forward = of.forward  # type: ignore[attr-defined]
        taken = [p for p in inspect.signature(forward).parameters.values() if p.name != "self"]
        called = parse(forward.__doc__)
        lines += ["Called as " + _call_text("module", taken) + ":", ""]
        lines += _table(taken, typing.get_type_hints(forward), called)
        lines += ["```python", f"from mmkernels.nn import {of.__name__}", "", *_as_code(doc.example), "```", ""]
    return "\n".join(lines)


def _as_code(example: Sequence[str]) -> list[str]:
    """The lines of a doctest as a program, with what they print in comments."""
    return [line[4:] if line[:4] in (">>> ", "... ") else f"# {line}" for line in example if line]


def rewritten(page: str) -> str:
    """A page with its tables as they should be."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        of = getattr(mmk.nn, name[3:]) if name.startswith("nn.") else getattr(mmk, name)
        return f"{match[1]}\n{table(of, name)}\n{match[3]}"

    return _BLOCK.sub(block, page)


def documented(page: str) -> list[str]:
    """The names that a page has tables of."""
    return [match[2] for match in _BLOCK.finditer(page)]


def main() -> int:
    torch.set_num_threads(1)
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        if (after := rewritten(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(f"Written: {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
