"""Ops over tensors that are spread over the ranks of a ``torch.distributed`` group.

The losses over a spread batch are what ``group=`` of the public functions leads to.
"""

from __future__ import annotations

from mmkernels.distributed.context_parallel import context_parallel_attention
from mmkernels.distributed.sequence_shards import shard_positions

__all__ = ["context_parallel_attention", "shard_positions"]
