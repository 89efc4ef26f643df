"""The CUDA kernels as compiled: what ``python -m mmkernels kernels`` adds to its table, read from the built library.

Needs NVIDIA's cuobjdump and nvdisasm, which triton brings, the c++filt of a C++ compiler, and no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmkernels import _cuda, _triton

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
HEADING = "# CUDA C++ kernels as compiled"

_INTRODUCTION = f"""{HEADING}

Every kernel of the library that is built where there is nvcc, on the four architectures that it holds code for.

A cell: registers per thread · tensor-core instructions · copies to shared memory in the background · global accesses of
16 bytes per thread. No kernel spills a register or has a stack; shared memory depends on the call, and the op's page
tells how much. The tests hold a build to this table as they do above.
"""
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)")
_DOT = re.compile(r"^HMMA\b")
_COPY = re.compile(r"^LDGSTS\b")
_WIDE = re.compile(r"^(?:LDG|STG|LDGSTS)\..*\b128\b")
_SPILL = re.compile(r"^(?:STL|LDL)\b")
_CELL = re.compile(r"(\d+) · (\d+) · (\d+) · (\d+)")


@dataclass
class Figures:
    """Of one kernel on one architecture."""

    registers: int
    stack: int = 0
    spills: int = 0
    dots: int = 0
    copies: int = 0
    wide: int = 0


Table = dict[str, dict[str, Figures]]  # kernel -> architecture


def absent() -> str | None:
    """Why there is nothing to read, or None."""
    if not _cuda.CUDA.path.exists():
        return f"{_cuda.CUDA.path.name} was not built"
    return _triton.absent()


def _lines(*arguments: str) -> Iterator[str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = {**os.environ, "PATH": os.pathsep.join([str(tools), os.environ.get("PATH", "")])}
    command = [str(tools / "cuobjdump"), *arguments, str(_cuda.CUDA.path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with {process.returncode}")


def _demangled(names: Sequence[str]) -> dict[str, str]:
    """``short_key_forward<Bf16, 64>`` for ``_ZN3mmk4cuda17short_key_forward…`` and the like."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = (re.sub(r"\(mmk::cuda::\w+\)(?=\d)", "", line) for line in done.stdout.splitlines())
    short = (line.split("(")[0].removeprefix("void ").replace("mmk::cuda::", "") for line in plain)
    return dict(zip(names, short, strict=True))


def table() -> Table:
    """All kernels of the library."""
    found: Table = {}
    architecture = name = ""
    figures = Figures(0)
    for line in _lines("--dump-resource-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s+REG:(\d+) STACK:(\d+)", line):
            found.setdefault(name, {})[architecture] = Figures(int(match[1]), int(match[2]))
    for line in _lines("-sass"):
        if match := _INSTRUCTION.match(line):
            instruction = match[1]
            figures.spills += bool(_SPILL.match(instruction))
            figures.dots += bool(_DOT.match(instruction))
            figures.copies += bool(_COPY.match(instruction))
            figures.wide += bool(_WIDE.match(instruction))
        elif match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s+Function : (\w+)", line):
            figures = found[match[1]][architecture]
    names = _demangled(list(found))
    return {names[name]: found[name] for name in sorted(found, key=names.__getitem__)}


def render(kernels: Table) -> str:
    """The part of docs/generated/kernels.md, its heading first."""
    lines = [_INTRODUCTION, f"| kernel | {' | '.join(ARCHITECTURES)} |", "|---" * (1 + len(ARCHITECTURES)) + "|"]
    for name, row in kernels.items():
        cells = [f"{f.registers} · {f.dots} · {f.copies} · {f.wide}" for f in (row[a] for a in ARCHITECTURES)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def section(document: str) -> str:
    """This part of docs/generated/kernels.md; empty where it has none."""
    _, heading, rest = document.partition(HEADING)
    return heading + rest


def excesses(kernels: Table, document: str) -> list[str]:
    """Where the kernels are over what docs/generated/kernels.md allows; one line each."""
    allowed: dict[tuple[str, str], tuple[int, ...]] = {}
    for line in section(document).splitlines():
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if len(cells) == 1 + len(ARCHITECTURES):
            for architecture, cell in zip(ARCHITECTURES, cells[1:], strict=True):
                if figures := _CELL.fullmatch(cell):
                    allowed[cells[0], architecture] = tuple(map(int, figures.groups()))
    wrong = []
    for name, row in kernels.items():
        for architecture in ARCHITECTURES:
            where, got = f"{name}, {architecture}", row.get(architecture)
            if got is None:
                wrong.append(f"{where}: not compiled")
                continue
            if got.spills or got.stack:
                wrong.append(f"{where}: {got.spills} spills, {got.stack} bytes of stack")
            if (name, architecture) not in allowed:
                wrong.append(f"{where}: not in the table")
                continue
            registers, *least = allowed[name, architecture]
            if got.registers > 1.1 * registers:
                wrong.append(f"{where}: {got.registers} registers, budget {registers}")
            kinds = ("tensor-core instructions", "background copies", "accesses of 16 bytes")
            for kind, had, has in zip(kinds, least, (got.dots, got.copies, got.wide), strict=True):
                if had and not has:
                    wrong.append(f"{where}: no {kind}")
    missing = {name for name, _ in allowed} - set(kernels)
    return wrong + [f"{name}: in the table, not compiled" for name in sorted(missing)]
