"""What a compiled kernel takes of a GPU and which instructions it has, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

# Most shared memory a program may have, bytes.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}

_NVIDIA_DOT = re.compile(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
_NVIDIA_WIDE = re.compile(r"\b(?:LDG|STG|LDGSTS)\.[A-Z0-9_.]*\b128\b|\bUTMALDG\b")
_NVIDIA_SPILL = re.compile(r"\b(?:STL|LDL)\b")
_AMD_DOT = re.compile(r"\bv_mfma_")
_AMD_WIDE = re.compile(r"\b(?:global|buffer)_(?:load|store)_dwordx4\b")


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target."""

    registers: int  # per thread
    spills: int  # instructions that move registers to memory and back; on AMD spilled registers
    shared: int  # bytes per program
    dots: int  # tensor-core instructions
    wide: int  # global accesses of 16 bytes per thread


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _of_nvidia(binary: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        code = _output(_tool("nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no registers: {usage!r}")
    return Resources(
        registers=int(found[1]),
        spills=len(_NVIDIA_SPILL.findall(code)),
        shared=binary.metadata.shared,
        dots=len(_NVIDIA_DOT.findall(code)),
        wide=len(_NVIDIA_WIDE.findall(code)),
    )


def _of_amd(binary: Any) -> Resources:
    code = binary.asm["amdgcn"]

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(found[1])

    return Resources(
        registers=figure("vgpr_count"),
        spills=figure("vgpr_spill_count"),
        shared=binary.metadata.shared,
        dots=len(_AMD_DOT.findall(code)),
        wide=len(_AMD_WIDE.findall(code)),
    )


def resources(target: GPUTarget, binary: Any) -> Resources:
    return _of_nvidia(binary) if target.backend == "cuda" else _of_amd(binary)
