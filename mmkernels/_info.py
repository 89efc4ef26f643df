"""What `python -m mmkernels info` prints: versions, instruction sets, threads, backends and GPUs of this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from mmkernels import _dispatch, _native
from mmkernels._amx import cpu_lines, torch_uses_amx


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    lines = cpu_lines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}" for p in properties]


def collect() -> dict[str, Any]:
    """Everything `info` prints, as plain values that JSON can hold."""
    return {
        "versions": {
            "mmkernels": _version("mmkernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "machine": {
            "cpu": _cpu_name(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": _gpus(),
            "amx": torch_uses_amx(cpu_lines(), os.environ),
        },
        "native": {
            "path": _native.library_path(),
            "reason": _native.reason(),
            "build": _native.build_info(),
            "compiled_isas": _native.compiled_isas(),
            "supported_isas": _native.supported_isas(),
            "isa": _native.isa(),
            "why_no_amx": _native.why_no_amx(),
        },
        "backends": _dispatch.backend_status(),
    }


def render(info: dict[str, Any]) -> str:
    """`info` as aligned text."""
    rows: list[tuple[str, str]] = []
    rows += [(name, version or "not installed") for name, version in info["versions"].items()]
    machine, native = info["machine"], info["native"]
    rows.append(("CPU", f"{machine['cpu']} ({machine['architecture']}, {machine['cores']} cores)"))
    rows.append(("torch's AMX", "in use" if machine["amx"] else "absent or switched off"))
    rows.append(("threads", str(machine["threads"])))
    rows += [("GPU", name) for name in machine["gpus"] or ["none"]]
    if native["reason"] is None:
        rows.append(("native library", native["path"]))
        rows.append(("built with", ", ".join(f"{what} {value}" for what, value in native["build"].items())))
        rows.append(("compiled ISAs", ", ".join(native["compiled_isas"])))
        rows.append(("supported ISAs", ", ".join(native["supported_isas"])))
        rows.append(("ISA in use", native["isa"]))
        rows.append(("AMX tiles", native["why_no_amx"] or "available"))
    else:
        rows.append(("native library", f"absent: {native['reason']}"))
    for name, reason in info["backends"].items():
        rows.append((f"backend {name}", "available" if reason is None else f"absent: {reason}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmkernels info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    info = collect()
    print(json.dumps(info, indent=2) if arguments.json else render(info))
    return 0
