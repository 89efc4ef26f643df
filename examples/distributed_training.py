"""Captions that find their photo and their sound, trained by several processes; beside it by one, with the same losses.

Each rank has its rows of every batch. The contrastive losses are those of the whole batch: embeddings travel, the
scores of all pairs never do. DistributedDataParallel averages gradients where those of this loss are to be added up,
which the factor makes good. The data are random: three linear views of one hidden vector.

    torchrun --nproc-per-node 2 examples/distributed_training.py
    torchrun --nproc-per-node 4 examples/distributed_training.py --loss sigmoid
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkernels as mmk

BATCH, STEPS, HIDDEN, WIDTH = 64, 20, 8, 32
SIZES = (24, 40, 16)  # features of captions, photos and sounds
SCALE, BIAS = 10.0, -10.0  # 1 / temperature, and what the sigmoid loss adds to the scores


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.GELU(), nn.Linear(64, WIDTH)) for size in SIZES
        )

    def forward(self, *views: Tensor) -> list[Tensor]:
        return [F.normalize(encoder(x), dim=-1) for encoder, x in zip(self.encoders, views, strict=True)]


def batches() -> list[list[Tensor]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    views = [torch.randn(HIDDEN, size, generator=generator) for size in SIZES]
    hidden = [torch.randn(BATCH, HIDDEN, generator=generator) for _ in range(STEPS)]
    return [[x @ view + 0.1 * torch.randn(BATCH, view.shape[1], generator=generator) for view in views] for x in hidden]


def pair_loss(name: str, x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if name == "sigmoid":
        return mmk.sigmoid_contrastive_loss(x, y, SCALE, BIAS, group=group)
    return mmk.contrastive_loss(x, y, SCALE, group=group)


def train(model: nn.Module, name: str, rows: slice, group: dist.ProcessGroup | None) -> list[float]:
    """The loss of each step, of the whole batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    factor = dist.get_world_size(group) if group is not None else 1
    losses = []
    for views in batches():
        text, image, sound = model(*(view[rows] for view in views))
        loss = sum(pair_loss(name, text, other, group) for other in (image, sound))
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax", help="of CLIP or of SigLIP")
    name = parser.parse_args().loss
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device("cuda")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Encoders()
    torch.manual_seed(0)
    alone = Encoders()
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    together = train(DistributedDataParallel(model), name, rows, dist.group.WORLD)
    if rank == 0:
        print(f"step   one process   {ranks} processes")
        in_one = train(alone, name, slice(None), None)
        for step, (one, many) in enumerate(zip(in_one, together, strict=True)):
            print(f"{step:4}   {one:11.6f}   {many:11.6f}")
        torch.testing.assert_close(together, in_one, rtol=0, atol=1e-4)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
