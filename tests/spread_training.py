"""One rank of training a model of three modalities, in the way that the command line names."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import take_part
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk

BATCH, STEPS, CLASSES = 8, 3, 4
WAYS = (
    *("ddp", "ddp, accumulated", "ddp, compiled"),
    *("fsdp", "fsdp, accumulated", "fsdp, checkpointed", "fsdp, bfloat16", "fsdp, compiled"),
)


class Model(nn.Module):
    """Text reads an image; both meet a sound; classes."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.text, self.image, self.sound = nn.Linear(6, 16), nn.Linear(10, 16), nn.Linear(5, 16)
        self.attention = mmk.nn.MultiheadCrossAttention(16, 2, batch_first=True)
        self.fusion = mmk.nn.ConcatFusion([16, 16, 16], 12, activation="gelu")
        self.head = nn.Linear(12, CLASSES)
        self.checkpointed = checkpointed

    def forward(self, text: Tensor, image: Tensor, sound: Tensor) -> Tensor:
        tokens, patches, sound = self.text(text), self.image(image), self.sound(sound)
        if self.checkpointed:
            fused = checkpoint(self.fused, tokens, patches, sound, use_reentrant=False)
        else:
            fused = self.fused(tokens, patches, sound)
        return self.head(fused)

    def fused(self, tokens: Tensor, patches: Tensor, sound: Tensor) -> Tensor:
        read, _ = self.attention(tokens, patches, patches, need_weights=False)
        return self.fusion([tokens.mean(1), read.mean(1), sound])


def model(way: str = "") -> Model:
    torch.manual_seed(7)
    return Model("checkpointed" in way)


def batches() -> list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(11)
    shapes = ((BATCH, 5, 6), (BATCH, 7, 10), (BATCH, 5))
    return [
        (
            tuple(torch.randn(shape, generator=generator) for shape in shapes),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def trained(net: nn.Module, way: str, rank: int = 0, ranks: int = 1) -> list[float]:
    """The losses of the steps, each the mean over the whole batch; a rank has its rows of it."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for inputs, labels in batches():
        rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        micro = 2 if "accumulated" in way else 1
        total = torch.zeros(())
        parts = zip(*(x[rows].chunk(micro) for x in (*inputs, labels)), strict=True)
        for i, (*mine, truth) in enumerate(parts):
            is_last = i + 1 == micro
            if hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(is_last)
            elif isinstance(net, DistributedDataParallel):
                net.require_backward_grad_sync = is_last
            loss, _ = mmk.multimodal_cross_entropy([net(*mine).float()], truth)
            (loss / micro).backward()
            total += loss.detach() / micro
        optimizer.step()
        optimizer.zero_grad()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses


def sharded(way: str, ranks: int) -> Any:
    net = model(way)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if "bfloat16" in way else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (ranks,))
    for part in (net.attention, net.fusion):
        fully_shard(part, mesh=mesh, mp_policy=half)
    return fully_shard(net, mesh=mesh, mp_policy=half)


def in_one_process(way: str) -> tuple[list[float], dict[str, Tensor]]:
    net = model(way)
    losses = trained(net, way)
    return losses, {k: v.detach() for k, v in net.state_dict().items()}


def in_way(way: str, rank: int, ranks: int) -> tuple[list[float], dict[str, Tensor]]:
    if way.startswith("fsdp"):
        net = sharded(way, ranks)
        called = torch.compile(net, backend="aot_eager") if "compiled" in way else net
        losses = trained(called, way, rank, ranks)
        return losses, whole(net)
    net = DistributedDataParallel(model(way))
    called = torch.compile(net, backend="aot_eager") if "compiled" in way else net
    losses = trained(called, way, rank, ranks)
    return losses, {k: v.detach() for k, v in net.module.state_dict().items()}


def saved(folder: str, rank: int, ranks: int) -> dict[str, Tensor]:
    """The weights that these ranks trained and saved."""
    net = sharded("fsdp", ranks)
    trained(net, "fsdp", rank, ranks)
    dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=folder)
    return whole(net)


def loaded(folder: str, net: nn.Module) -> nn.Module:
    """The module with the weights of the folder, on any number of ranks, or without a group."""
    state = {"model": get_model_state_dict(net)}
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(net, state["model"])
    return net


def whole(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.full_tensor().detach().clone() for k, v in net.state_dict().items()}


def work(rank: int, ranks: int, folder: str) -> Any:
    if ranks == 4:
        return saved(folder, rank, ranks)
    return {
        "loaded": whole(loaded(folder, sharded("fsdp", ranks))),
        **{way: in_way(way, rank, ranks) for way in WAYS},
    }


if __name__ == "__main__":
    take_part(work)
