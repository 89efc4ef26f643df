"""Which tokens of a sequence each rank holds.

Zig-zag: the sequence is cut into 2R chunks, and rank r holds chunks r and 2R − 1 − r, so that under a causal mask all
ranks have the same amount of work (Dubey et al., "The Llama 3 Herd of Models", 2024, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mmkernels.distributed.collectives import check_group
from mmkernels.ops import _checks as checks

Order = Literal["contiguous", "zigzag"]
Segment = tuple[int, int]  # first position, and how many follow it


def check_order(op: str, order: str) -> None:
    if order not in ("contiguous", "zigzag"):
        raise checks.value_error(op, "order", "'contiguous' or 'zigzag'", repr(order))


def group_of(op: str, mesh: Any) -> Any:
    """The process group of a mesh of one dim, or the group itself."""
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise checks.value_error(op, "mesh", "one dim, as mesh[name] has", f"{mesh.ndim} dims")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise checks.type_error(op, "mesh", "a DeviceMesh or a ProcessGroup", type(mesh).__name__)
    check_group(op, "mesh", mesh)
    return mesh


def _chunks(length: int, count: int) -> list[Segment]:
    """As ``torch.tensor_split``: the first ``length % count`` chunks are one longer."""
    small, longer = divmod(length, count)
    return [(i * small + min(i, longer), small + (i < longer)) for i in range(count)]


def zigzag_segments(length: int, ranks: int) -> list[list[Segment]]:
    """Of each rank."""
    chunks = _chunks(length, 2 * ranks)
    return [[chunks[r], chunks[2 * ranks - 1 - r]] for r in range(ranks)]


def contiguous_segments(counts: Sequence[int]) -> list[list[Segment]]:
    """Of each rank, for any number of tokens on each."""
    return [[(sum(counts[:r]), count)] for r, count in enumerate(counts)]


def shard_positions(length: int, mesh: Any, *, order: Order = "contiguous") -> Tensor:
    """The positions in a sequence of ``length`` tokens that this rank holds, in its order.

    Args:
        length: tokens of the whole sequence.
        mesh: a DeviceMesh of one dim, or a process group.
        order: "contiguous": parts one after another. "zigzag": of 2R chunks, rank r has chunks r and 2R − 1 − r.

    Returns:
        (n,) int64 on the CPU. ``x[:, :, positions]`` is this rank's shard of x (B, H, L, D), and also how rotary
        embeddings or labels are taken to it; ``whole[:, :, positions] = shard`` puts it back.

    Raises:
        ValueError: a negative length, an unknown order, a mesh of several dims or without this process.
        TypeError: a wrong type.
    """
    op = "shard_positions"
    length = checks.check_index(op, "length", length)
    if length < 0:
        raise checks.value_error(op, "length", "a number of tokens", length)
    check_order(op, order)
    group = group_of(op, mesh)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    held = zigzag_segments(length, ranks)[rank] if order == "zigzag" else [_chunks(length, ranks)[rank]]
    return torch.cat([torch.arange(first, first + count, device="cpu") for first, count in held])
