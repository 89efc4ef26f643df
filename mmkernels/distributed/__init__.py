"""Ops over tensors that are spread over the ranks of a ``torch.distributed`` group, and modules whose weights are.

The losses over a spread batch are what ``group=`` of the public functions leads to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmkernels.distributed.context_parallel import context_parallel_attention
from mmkernels.distributed.sequence_shards import shard_positions

if TYPE_CHECKING:
    from mmkernels.distributed.module_parallel import ModuleParallel, parallel_plan

__all__ = ["ModuleParallel", "context_parallel_attention", "parallel_plan", "shard_positions"]


def __getattr__(name: str) -> Any:
    if name in ("ModuleParallel", "parallel_plan"):  # on DTensors, which few programs need
        from mmkernels.distributed import module_parallel

        return getattr(module_parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
