"""Three modalities trained in stages by several processes: the encoders, then with these frozen the fusion, then all.

A frozen part costs no gradient time: autograd has no backward of the encoders then, and `concat_norm_linear` computes
no gradients of features. The timers show it: the backward of a step with frozen encoders beside that of the fusion on
features that were computed before. DistributedDataParallel asks once which parameters need a gradient, so each stage
has its own. The data are random: a modality knows one of the label's three bits.

    torchrun --nproc-per-node 2 examples/staged_training.py
"""

from __future__ import annotations

import os
import time
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkernels as mmk

BATCH, STEPS = 256, 24
SIZES, HIDDEN, WIDTH = (96, 128, 64), 256, 32
STAGES = {"encoders": ("encoders", "heads"), "fusion": ("fusion",), "all": ("encoders", "fusion")}  # what is trained


class Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(len(SIZES) * WIDTH)
        self.linear, self.head = nn.Linear(len(SIZES) * WIDTH, 64), nn.Linear(64, 2 ** len(SIZES))

    def forward(self, features: list[Tensor]) -> Tensor:
        weights = (self.norm.weight, self.norm.bias, self.linear.weight, self.linear.bias)
        return self.head(mmk.concat_norm_linear(features, *weights, activation="gelu"))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for size in SIZES
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in SIZES)  # with which an encoder learns alone
        self.fusion = Fusion()

    def forward(self, views: list[Tensor], label: Tensor, stage: str) -> Tensor:
        features = [encoder(x) for encoder, x in zip(self.encoders, views, strict=True)]
        if stage != "encoders":
            return F.cross_entropy(self.fusion(features), label)
        bits = [head(x) for head, x in zip(self.heads, features, strict=True)]
        return torch.stack([F.cross_entropy(x, (label >> i) & 1) for i, x in enumerate(bits)]).sum()


def batch(step: int) -> tuple[list[Tensor], Tensor]:
    """A modality is noise, and a direction of its own with the sign of its bit."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(step)
    label = torch.randint(2 ** len(SIZES), (BATCH,), generator=generator)
    signs = [1.0 - 2.0 * ((label >> i) & 1) for i in range(len(SIZES))]
    views = [torch.randn(BATCH, size, generator=generator) for size in SIZES]
    return [view + 0.2 * sign[:, None] for view, sign in zip(views, signs, strict=True)], label


def backward_time(loss: Tensor) -> float:
    start = time.perf_counter()
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train(model: Model, rows: slice, ranks: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Of each stage the losses of its steps, of the whole batch, and the median time of a backward."""
    losses: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for i, (stage, parts) in enumerate(STAGES.items()):
        for name, part in model.named_children():
            part.requires_grad_(name in parts)
        called = DistributedDataParallel(model) if ranks > 1 else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        losses[stage], times = [], []
        for step in range(STEPS):
            views, label = batch(i * STEPS + step)
            loss = called([view[rows] for view in views], label[rows], stage)
            optimizer.zero_grad()
            times.append(backward_time(loss))
            optimizer.step()
            mean = loss.detach() / ranks
            if ranks > 1:
                dist.all_reduce(mean)
            losses[stage].append(float(mean))
        seconds[stage] = median(times)
    return losses, seconds


def fusion_alone(model: Model) -> float:
    """The median time of the fusion's backward on features without history."""
    views, label = batch(0)
    with torch.no_grad():
        features = [encoder(x) for encoder, x in zip(model.encoders, views, strict=True)]
    return median(backward_time(F.cross_entropy(model.fusion(features), label)) for _ in range(STEPS))


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model()
    torch.manual_seed(0)
    alone = Model()
    together, _ = train(model, slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks), ranks)
    if rank == 0:
        print(f"stage      step   one process   {ranks} processes")
        losses, seconds = train(alone, slice(None), 1)
        for stage in STAGES:
            for step in range(0, STEPS, STEPS // 4):
                print(f"{stage:8}   {step:4}   {losses[stage][step]:11.6f}   {together[stage][step]:11.6f}")
        torch.testing.assert_close(together, losses, rtol=0, atol=1e-4)
        print("\nbackward of a step in one process, ms")
        for what, time_taken in {**seconds, "fusion, of stored features": fusion_alone(alone)}.items():
            print(f"{what:26}   {1e3 * time_taken:6.2f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
