"""The machine that the numbers belong to, in one line."""

from __future__ import annotations

from typing import Any

import torch


def caption(info: dict[str, Any]) -> str:
    """What ``mmkernels._info.collect()`` gathered, as the caption of a table or a plot."""
    machine, native = info["machine"], info["native"]
    isa = f"mmkernels on {native['isa']}" if native["reason"] is None else "mmkernels without its native library"
    torch_isa = torch.backends.cpu.get_cpu_capability()
    plural = "" if machine["threads"] == 1 else "s"
    torch_version = info["versions"]["torch"]
    return f"{machine['cpu']}, {machine['threads']} thread{plural}; {isa}, torch {torch_version} on {torch_isa}"
