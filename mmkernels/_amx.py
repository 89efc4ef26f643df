"""Whether torch multiplies half precision on AMX tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def cpu_lines() -> list[str]:
    """What the system says of the CPU; empty where it says nothing."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def torch_uses_amx(cpu_lines: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether torch's bfloat16 products run on AMX tiles: the core has them and nothing keeps oneDNN below them."""
    flags = next((line.partition(":")[2].split() for line in cpu_lines if line.startswith("flags")), [])
    limit = (environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or "DEFAULT").upper()
    return "amx_bf16" in flags and (limit in ("ALL", "DEFAULT") or "AMX" in limit or limit.startswith("AVX10_2"))
