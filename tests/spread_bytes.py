"""One rank of steps whose sent bytes and memory are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from context_parallel import PeakMemory
from processes import take_part
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk
from mmkernels.distributed import context_parallel_attention

ROWS, FEATURES = 32, 24  # of the whole batch
HEADS, TOKENS, WIDTH = 2, 96, 16  # of the whole sequence
OUTPUTS = 12
BLOCKS = 3


class SentBytes(TorchDispatchMode):
    """Bytes of floating-point tensors that this rank sends in this block, by collectives that go around rings.

    What it counts is what the collectives are given.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent = 0.0
        self.told = 0  # of integers: what ranks tell one another of a call

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.count(function.__name__.partition(".")[0], args)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, args: Any) -> None:
        others = self.ranks - 1
        # For each the argument that holds what this rank gives, and how often a ring has it sent.
        ways = {
            "send": (0, 1.0),
            "allgather_": (1, others),
            "_allgather_base_": (1, others),
            "all_gather_into_tensor": (0, others),
            "allreduce_": (0, 2 * others / self.ranks),
            "all_reduce": (0, 2 * others / self.ranks),
            "_reduce_scatter_base_": (1, others / self.ranks),
            "reduce_scatter_tensor": (0, others / self.ranks),
        }
        if name in ("recv_", "wait_tensor", "_wrap_tensor_autograd"):  # which send nothing
            return
        at, times = ways[name]
        for x in tree_leaves(args[at]):
            size = x.numel() * x.element_size()
            if x.is_floating_point():
                self.sent += size * times
            else:
                self.told += size


def linears(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(BLOCKS))), torch.randn(4, 16, dtype=dtype)


def fully_sharded(ranks: int) -> tuple[nn.Module, Tensor]:
    net, x = linears(torch.bfloat16)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = init_device_mesh("cpu", (ranks,))
    for part in net:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy), x


def features(ranks: int) -> list[Tensor]:
    return [nn.functional.normalize(torch.randn(ROWS // ranks, FEATURES)).requires_grad_() for _ in range(2)]


def attention(ranks: int, method: str, again: bool = False, **options: Any) -> Tensor:
    query, key, value = (torch.randn(1, HEADS, TOKENS // ranks, WIDTH, requires_grad=True) for _ in range(3))

    def call(*inputs: Tensor) -> Tensor:
        return context_parallel_attention(*inputs, dist.group.WORLD, method=method, **options)

    return checkpoint(call, query, key, value, use_reentrant=False) if again else call(query, key, value)


def row_parallel(ranks: int) -> Tensor:
    mesh = init_device_mesh("cpu", (ranks,))
    x = DTensor.from_local(torch.randn(ROWS, FEATURES // ranks), mesh, [Shard(1)])
    weight = DTensor.from_local(torch.randn(OUTPUTS, FEATURES // ranks), mesh, [Shard(1)])
    return mmk.concat_linear([x], weight).redistribute(placements=[Replicate()]).to_local()


def sigmoid_loss(ranks: int) -> Tensor:
    from mmkernels.distributed import contrastive as spread

    x, y = features(ranks)
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (2.0, -1.0))
    spread.GATHERED_BYTES = 0  # so that this y is large
    return mmk.sigmoid_contrastive_loss(x, y, scale, bias, group=dist.group.WORLD)


def contrastive_loss(ranks: int) -> Tensor:
    scale = torch.tensor(2.0, requires_grad=True)
    return mmk.contrastive_loss(*features(ranks), scale, group=dist.group.WORLD)


def stepped(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).float().sum()


def ways(ranks: int) -> dict[str, Callable[[], Tensor]]:
    fsdp, half = fully_sharded(ranks)
    plain, x = linears(torch.float32)
    ddp = DistributedDataParallel(plain)
    for _ in range(2):  # in its second step it tells of its buckets
        stepped(ddp, x).backward()
    return {
        "fully_sharded": lambda: stepped(fsdp, half),
        "replicated": lambda: stepped(ddp, x),
        "contrastive": lambda: contrastive_loss(ranks),
        "sigmoid_ring": lambda: sigmoid_loss(ranks),
        "context_ring": lambda: attention(ranks, "ring").sum(),
        "context_ring, twice": lambda: attention(ranks, "ring", again=True).sum(),
        "window": lambda: attention(ranks, "ring", window=(4, 0)).sum(),
        "causal": lambda: attention(ranks, "ring", is_causal=True).sum(),
        "context_gather": lambda: attention(ranks, "gather").sum(),
        "row_parallel": lambda: row_parallel(ranks),
    }


def bytes_of_states(ranks: int) -> int:
    """Of weights, gradients and Adam's moments, after a step."""
    net, x = fully_sharded(ranks)
    optimizer = torch.optim.Adam(net.parameters())
    stepped(net, x).backward()
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [x.to_local() for p in net.parameters() for x in (p, p.grad)] + [x.to_local() for x in moments]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return sum(storages.values())


def bytes_kept_by_checkpoints() -> int:
    """By a stack of blocks, after its forward."""
    blocks = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(BLOCKS)]
    with PeakMemory() as memory:
        x = torch.randn(ROWS, 8, requires_grad=True)
        for block in blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False)
        return memory.live


def bytes_of_a_ring(ranks: int) -> int:
    """Beyond inputs, at the most in a forward."""
    query, key, value = (torch.randn(1, HEADS, 16 * TOKENS // ranks, WIDTH) for _ in range(3))
    with PeakMemory() as memory:
        context_parallel_attention(query, key, value, dist.group.WORLD, method="ring")
    return memory.peak


def bytes_of_a_batch(ranks: int) -> int:
    """That a contrastive loss keeps for its backward, of both sides."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.shape == (ROWS, FEATURES):
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = contrastive_loss(ranks)
    assert loss.requires_grad
    return sum(kept.values())


def work(rank: int, ranks: int) -> dict[str, Any]:
    torch.manual_seed(0)
    sent, told = {}, {}
    for name, way in ways(ranks).items():
        with SentBytes(ranks) as count:
            result = way()
            if result.requires_grad:
                result.backward()
        sent[name], told[name] = count.sent, count.told
    return {
        "sent": sent,
        "told": told,
        "states": bytes_of_states(ranks),
        "checkpoints": bytes_kept_by_checkpoints(),
        "ring": bytes_of_a_ring(ranks),
        "batch": bytes_of_a_batch(ranks),
    }


if __name__ == "__main__":
    take_part(work)
