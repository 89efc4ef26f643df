"""``python -m mmkernels kernels``: every kernel compiled for every target, without a GPU, and held to budgets.

The calls that an op's ``kernel_triton.py`` lists are made on meta tensors, forward and backward, so that its own
launches say what is compiled. docs/generated/kernels.md is the table of what came out, and the budget of what comes out
next. It also has a digest of what each op's kernels were compiled from, so that a check compiles only what changed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import mmkernels as mmk
from mmkernels import _cuda_table, _triton
from mmkernels.triton.launch import compiling_for, sources_for
from mmkernels.triton.resources import SHARED_LIMITS, Resources, resources

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # the last for an op's first call alone
DOCUMENT = Path("docs/generated/kernels.md")
_OPS = Path(__file__).parents[1] / "ops"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: the first call that launched it, what it was launched with, and on which op's behalf."""

    op: str
    call: str
    dtype: str
    name: str
    config: str


Table = dict[Kernel, dict[str, Resources]]  # by target


def ops_with_kernels() -> list[str]:
    return sorted(path.parent.name for path in _OPS.glob("*/kernel_triton.py"))


# --- compiling --------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def _leaf(leaves: list[Tensor], default: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    dtype = dtype or default
    leaves.append(torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point))
    return leaves[-1]


def _launches(op: str) -> Iterator[tuple[str, str]]:
    """Makes each call that the op lists, forward and backward; yields its label and dtype after it."""
    leaves: list[Tensor] = []
    for dtype in DTYPES:
        new = functools.partial(_leaf, leaves, dtype)
        for label, call in importlib.import_module(f"mmkernels.ops.{op}.kernel_triton").calls(new):
            outputs = [o for o in _tensors(call()) if o.requires_grad]
            wanted = [x for x in leaves if x.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs], allow_unused=True)
            leaves.clear()
            yield label, str(dtype)[6:]
            if dtype is DTYPES[-1]:
                break


def sources_of(op: str) -> str:
    """A digest of what the op's kernels are compiled from, by this triton and for all targets."""
    found = [triton.__version__]
    for target in TARGETS.values():
        with sources_for(target) as sources, mmk.use_backend("triton"):
            for _ in _launches(op):
                pass
        found += sorted(set(sources))
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def compile_op(op: str, target_name: str) -> list[tuple[Kernel, Resources]]:
    """All kernels of an op's calls, forward and backward, each distinct one once."""
    target = TARGETS[target_name]
    found: list[tuple[Kernel, Resources]] = []
    seen: set[str] = set()
    with compiling_for(target) as compiled, mmk.use_backend("triton"):
        for label, dtype in _launches(op):
            for launched in compiled:
                if launched.binary.hash not in seen:
                    seen.add(launched.binary.hash)
                    kernel = Kernel(op, label, dtype, launched.kernel.removeprefix("_"), str(launched.config))
                    found.append((kernel, resources(target, launched.binary)))
            compiled.clear()
    return found


def compile_all(ops: Sequence[str], processes: int) -> Table:
    """The kernels of the ops on every target."""
    jobs = [(op, target) for op in ops for target in TARGETS]
    context = multiprocessing.get_context("spawn")
    table: Table = {}
    with ProcessPoolExecutor(processes, mp_context=context) if processes > 1 else nullcontext() as pool:
        results = (pool.map if pool else map)(compile_op, [op for op, _ in jobs], [target for _, target in jobs])
        for (_, target), kernels in zip(jobs, results, strict=True):
            for kernel, figures in kernels:
                table.setdefault(kernel, {})[target] = figures
    return table


# --- the document -----------------------------------------------------------------------------------------------------

_HEADING = f"""# Triton kernels as compiled

Every configuration of every Triton kernel, compiled ahead of time for four targets by `make kernels`, which needs no
GPU. The calls are those that each op's `kernel_triton.py` lists; a kernel that several share stands at the first.

A cell: registers per thread · KB of shared memory · tensor-core instructions · global accesses of 16 bytes per thread.
No kernel spills a register. The tests compile again what changed since, which the sources' digests tell, and hold it to
this table: no spill, no more shared memory, registers within 10 %, and tensor cores and wide accesses wherever the
table has them.

triton {triton.__version__}
"""
_SOURCES = "Compiled from "
_CELL = re.compile(r"(\d+) · ([\d.]+) · (\d+) · (\d+)")


def _cell(figures: Resources | None) -> str:
    if figures is None:
        return ""
    return f"{figures.registers} · {figures.shared / 1024:.1f} · {figures.dots} · {figures.wide}"


def render(table: Table, sources: Mapping[str, str]) -> str:
    lines = [_HEADING]
    for op in sorted({kernel.op for kernel in table}):
        lines += [
            f"## {op}",
            "",
            f"{_SOURCES}`{sources[op]}`",
            "",
            f"| call | dtype | kernel | {' | '.join(TARGETS)} |",
            "|---" * (3 + len(TARGETS)) + "|",
        ]
        for kernel, figures in table.items():
            if kernel.op == op:
                cells = " | ".join(_cell(figures.get(target)) for target in TARGETS)
                lines.append(f"| {kernel.call} | {kernel.dtype} | {kernel.name}: {kernel.config} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def recorded_sources(document: str) -> dict[str, str]:
    """Op -> `sources_of` it when its part of the document was written."""
    return dict(re.findall(rf"^## (\w+)\n\n{_SOURCES}`(\w+)`$", document, re.M))


Budget = tuple[int, float, int, int]  # registers, KB of shared memory, tensor-core instructions, wide accesses


def budgets(document: str) -> dict[tuple[Kernel, str], Budget]:
    """What docs/generated/kernels.md allows each kernel on each target."""
    found: dict[tuple[Kernel, str], Budget] = {}
    op = ""
    for line in document.splitlines():
        if line.startswith("## "):
            op = line[3:]
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if not op or len(cells) != 3 + len(TARGETS):
            continue
        name, _, config = cells[2].partition(": ")
        for target, cell in zip(TARGETS, cells[3:], strict=True):
            if figures := _CELL.fullmatch(cell):
                r, s, d, w = figures.groups()
                found[Kernel(op, cells[0], cells[1], name, config), target] = (int(r), float(s), int(d), int(w))
    return found


def excesses(table: Table, document: str) -> list[str]:
    """Where the kernels are over budget; one line each."""
    wrong: list[str] = []
    allowed = budgets(document)
    same_triton = f"triton {triton.__version__}\n" in document  # another one may allot registers otherwise
    measured = {(kernel, target): r for kernel, row in table.items() for target, r in row.items()}
    for (kernel, target), got in measured.items():
        where = f"{kernel.op}, {kernel.call}, {kernel.dtype}, {kernel.name}: {kernel.config}, {target}"
        if got.spills:
            wrong.append(f"{where}: {got.spills} spills")
        if got.shared > SHARED_LIMITS[TARGETS[target].arch]:
            wrong.append(f"{where}: {got.shared} bytes of shared memory are more than the target has")
        if not same_triton:
            continue
        if (kernel, target) not in allowed:
            wrong.append(f"{where}: not in the table")
            continue
        registers, shared, dots, wide = allowed[kernel, target]
        if got.registers > 1.1 * registers:
            wrong.append(f"{where}: {got.registers} registers, budget {registers}")
        if got.shared / 1024 > shared + 0.05:
            wrong.append(f"{where}: {got.shared / 1024:.1f} KB of shared memory, budget {shared}")
        if dots and not got.dots:
            wrong.append(f"{where}: no tensor-core instructions")
        if wide and not got.wide:
            wrong.append(f"{where}: no accesses of 16 bytes")
    if same_triton:
        ops = {kernel.op for kernel in table}
        wrong += [
            f"{k.op}, {k.call}, {k.dtype}, {k.name}: {k.config}, {t}: in the table, not compiled"
            for k, t in allowed
            if k.op in ops and (k, t) not in measured
        ]
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmkernels kernels", description="compile every kernel for a GPU")
    parser.add_argument("--ops", default="", help="comma-separated ops, default all that have kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default one per core")
    parser.add_argument("--update", action="store_true", help=f"also write {DOCUMENT}")
    parser.add_argument(
        "--check", action="store_true", help=f"hold the kernels that changed to {DOCUMENT}; print only what is over"
    )
    args = parser.parse_args(argv)
    if reason := _triton.absent():
        parser.error(reason)
    if _triton.interpreting():
        parser.error("TRITON_INTERPRET=1 is set, and interpreted kernels are not compiled")
    start = time.perf_counter()
    document = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    without_cuda = "left out with --ops" if args.ops else _cuda_table.absent()
    of_cuda = None if without_cuda else _cuda_table.table()
    ops = args.ops.split(",") if args.ops else ops_with_kernels()
    sources = {op: sources_of(op) for op in ops}
    recorded = recorded_sources(document) if args.check and not args.update else {}
    changed = [op for op in ops if sources[op] != recorded.get(op)]
    table = compile_all(changed, args.jobs)
    wrong = excesses(table, document if args.check else "")
    cuda_part = _cuda_table.section(document) if of_cuda is None else _cuda_table.render(of_cuda)
    text = f"{render(table, sources)}\n{cuda_part}"
    if args.update:
        DOCUMENT.write_text(text)
    if of_cuda is not None and args.check:
        wrong += _cuda_table.excesses(of_cuda, document)
    if not args.check:
        print(text)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    count = sum(len(row) for row in table.values())
    print(
        f"{count} kernels on {len(TARGETS)} targets in {time.perf_counter() - start:.0f} s, {len(wrong)} over budget; "
        f"{len(ops) - len(changed)} ops as they were; "
        f"CUDA C++: {without_cuda or len(of_cuda or ())}."
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
