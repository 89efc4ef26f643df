"""The machine that the numbers belong to: its name in one line, and the rates that bound every row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .timing import GPU_WORKING_SETS, clock, gemm_rate, memory_rates


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best, measured in the same run and with the same threads as the rows."""

    gemm: dict[str, float]  # FLOP/s of a plain matrix product, by dtype
    memory: dict[int, float]  # bytes/s, by the bytes of the working set

    def bound(self, flops: float, moved: float, dtype: str) -> float:
        """Seconds that a row takes at least: its arithmetic at the matrix product's rate, or its bytes at the rate of
        the smallest working set that holds them, whichever is slower."""
        size = min((size for size in self.memory if size >= moved), default=max(self.memory))
        return max(flops / self.gemm[dtype], moved / self.memory[size])

    def __str__(self) -> str:
        """In words; a dtype with float32's rate has none of its own that is faster."""
        single = self.gemm.get("float32")
        products = ", ".join(
            f"{name} {rate / 1e9:.0f} GF/s"
            + (" (float32's, its own is slower)" if name != "float32" and rate == single else "")
            for name, rate in self.gemm.items()
        )
        memory = ", ".join(f"{size >> 20} MiB {rate / 1e9:.0f} GB/s" for size, rate in self.memory.items())
        return f"a plain matrix product: {products}; a copy or a sum over {memory}"


def measure_ceilings(dtypes: dict[str, torch.dtype], threads: int, device: str = "cpu") -> Ceilings:
    """The rates by name of dtype. A CPU without arithmetic in a dtype can still convert to float32 and multiply there,
    so float32's rate is the ceiling of a dtype whose own product is slower."""
    now = clock(threads, device)
    of_a_gpu = device != "cpu"
    product = partial(gemm_rate, n=8192) if of_a_gpu else gemm_rate
    memory = partial(memory_rates, sizes=GPU_WORKING_SETS) if of_a_gpu else memory_rates
    with torch.device(device):
        rates = {name: product(dtype, now) for name, dtype in {"float32": torch.float32, **dtypes}.items()}
        return Ceilings({name: max(rates[name], rates["float32"]) for name in dtypes}, memory(now))


def caption(info: dict[str, Any]) -> str:
    """What ``mmkernels._info.collect()`` gathered, as the caption of a table or a plot."""
    machine, native = info["machine"], info["native"]
    if info.get("device") == "cuda":
        gpu, versions = machine["gpus"][torch.cuda.current_device()], info["versions"]
        return f"{gpu}; torch {versions['torch']}, triton {versions['triton']}"
    isa = f"mmkernels on {native['isa']}" if native["reason"] is None else "mmkernels without its native library"
    torch_isa = torch.backends.cpu.get_cpu_capability() + (" and AMX" if machine.get("amx") else "")
    counts = info.get("thread_counts") or [machine["threads"]]
    threads = f"{' and '.join(map(str, counts))} thread{'' if counts == [1] else 's'}"
    torch_version = info["versions"]["torch"]
    return f"{machine['cpu']}, {threads}; {isa}, torch {torch_version} on {torch_isa}"
