"""A pipeline of two stages, encoders and fusion, each on a process of its own; beside it the same model in one process.

A batch goes through in micro-batches, by the schedule 1F1B of ``torch.distributed.pipelining``: while the second stage
fuses one, the first encodes the next. What travels is three tensors of features, and back their gradients. The loss is
the mean over the micro-batches, so that it is that of the whole batch. The data are random: a class is a direction in
each modality.

    torchrun --nproc-per-node 2 examples/pipeline_training.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import mmkernels as mmk

BATCH, MICRO_BATCHES, STEPS, CLASSES, WIDTH = 64, 4, 20, 6, 32
TOKENS, PATCHES = 12, 20
SIZES = (24, 48, 16)  # features of words, patches and a sound


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.GELU(), nn.Linear(64, WIDTH)) for size in SIZES
        )

    def forward(self, words: Tensor, patches: Tensor, sound: Tensor) -> tuple[Tensor, ...]:
        views = (words, patches, sound)
        return tuple(encoder(x) for encoder, x in zip(self.encoders, views, strict=True))


class Fusion(nn.Module):
    """Words read the patches; both meet the sound."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = mmk.nn.MultiheadCrossAttention(WIDTH, 4, batch_first=True)
        self.fusion = mmk.nn.ConcatFusion([WIDTH] * 3, 64, activation="gelu")
        self.head = nn.Linear(64, CLASSES)

    def forward(self, words: Tensor, patches: Tensor, sound: Tensor) -> Tensor:
        read, _ = self.attention(words, patches, patches, need_weights=False)
        return self.head(self.fusion([words.mean(1), read.mean(1), sound]))


def batches() -> list[tuple[list[Tensor], Tensor]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    directions = [torch.randn(CLASSES, size, generator=generator) for size in SIZES]
    found = []
    for _ in range(STEPS):
        label = torch.randint(CLASSES, (BATCH,), generator=generator)
        words, patches, sound = (direction[label] for direction in directions)
        views = [words[:, None].expand(-1, TOKENS, -1), patches[:, None].expand(-1, PATCHES, -1), sound]
        found.append(([x + torch.randn(x.shape, generator=generator) for x in views], label))
    return found


def optimizer_of(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)


def in_one_process(encoders: Encoders, fusion: Fusion) -> list[float]:
    optimizers = [optimizer_of(part) for part in (encoders, fusion)]
    losses = []
    for views, label in batches():
        loss = F.cross_entropy(fusion(*encoders(*views)), label)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def in_a_pipeline(part: nn.Module, rank: int, device: torch.device) -> list[float]:
    """The losses, which the second stage knows."""
    stage = PipelineStage(part, rank, 2, device)
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=F.cross_entropy)
    optimizer = optimizer_of(part)
    losses = []
    for views, label in batches():
        if rank == 0:
            schedule.step(*views, return_outputs=False)
        else:
            of_parts: list[Tensor] = []
            schedule.step(target=label, losses=of_parts, return_outputs=False)
            losses.append(float(torch.stack(of_parts).detach().mean()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks != 2:
        raise SystemExit(f"the pipeline has two stages; start two processes, not {ranks}")
    torch.manual_seed(0)
    parts = [Encoders(), Fusion()]
    torch.manual_seed(0)
    whole = Encoders(), Fusion()
    in_stages = in_a_pipeline(parts[rank], rank, device)
    if rank == 1:
        print("step   one process   2 stages")
        in_one = in_one_process(*whole)
        for step, (one, two) in enumerate(zip(in_one, in_stages, strict=True)):
            print(f"{step:4}   {one:11.6f}   {two:8.6f}")
        torch.testing.assert_close(in_stages, in_one, rtol=0, atol=1e-4)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
