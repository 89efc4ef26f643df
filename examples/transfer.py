"""Encoders learnt on other classes, frozen, and only the fusion trained: what that saves and costs.

Encoders of image and sound learn the digits 0 to 4. Then they are frozen, and a fusion layer on top learns 5 to 9,
which the encoders never saw (Yosinski et al., How transferable are features in deep neural networks?, 2014; frozen
encoders with a small trained bridge are also BLIP-2's way, Li et al., 2023). Frozen means free: no gradient is computed
for the encoders, which is checked by asking autograd, and timed. Against it stand the same encoders frozen at random,
which say what the first half of the digits taught, and everything trained.

    python examples/transfer.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from torch import nn

WIDTH, CLASSES, FEW = 8, 5, 25  # examples of the second half that are labelled


class Network(nn.Module):
    """Encoders, each of two layers, and a fusion that classifies five digits."""

    def __init__(self, ops, sizes: list[int], encoders: nn.Module | None = None, frozen: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH), nn.ReLU())
            for size in sizes
        )
        self.fuse, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        if encoders is not None:
            self.encoders.load_state_dict(encoders.state_dict())
        self.encoders.requires_grad_(not frozen)

    def forward(self, xs):
        xs = [encoder(x) for encoder, x in zip(self.encoders, xs, strict=True)]
        return self.head(self.ops.concat_linear(xs, self.fuse.weight, self.fuse.bias, activation="relu"))

    def loss(self, xs, label):
        return nn.functional.cross_entropy(self(xs), label % CLASSES)


def seen_and_heard(events: data.Events) -> list[torch.Tensor]:
    return events.features()[:2]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=4)
    train, test = data.split(data.draw_events(noise=0.5, loudness=1.0))
    sizes = [x.shape[1] for x in seen_and_heard(train)]
    first, second = train[train.label < CLASSES], train[train.label >= CLASSES][:FEW]
    asked = test[test.label >= CLASSES]

    source = example.train(
        "digits 0 to 4",
        partial(Network, sizes=sizes),
        data.batches(first, seen_and_heard),
        example.steps(300, quick=150),
    )
    plans = {
        "frozen, from 0 to 4": dict(encoders=source.encoders, frozen=True),
        "frozen at random": dict(frozen=True),
        "all trained, from 0 to 4": dict(encoders=source.encoders),
    }
    rows, scores, models = [], {}, {}
    for name, plan in plans.items():
        make = partial(Network, sizes=sizes, **plan)
        draw = data.batches(second, seen_and_heard, size=FEW)
        models[name] = example.train(name, make, draw, example.steps(150, quick=60))
        scores[name] = accuracy(models[name](seen_and_heard(asked)), asked.label % CLASSES)
        trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        rows.append([name, scores[name], trained, f"{1e3 * example.seconds['mmkernels']:.2f}"])
    example.table([f"fusion of 5 to 9, {FEW} examples", "accuracy", "trained parameters", "ms a step"], rows)
    frozen, random, whole = scores.values()
    example.check("what was learnt on other digits helps", frozen > random)
    example.check("frozen encoders come within 15 points of training all", frozen > whole - 0.15)
    example.check(
        "frozen parameters have no gradient",
        all(p.grad is None for p in models["frozen, from 0 to 4"].encoders.parameters()),
    )
    with example.picture(size=(6, 2.4)) as axes:
        axes.barh(list(scores), list(scores.values()), color=["C1", "0.6", "C0"])
        axes.set(xlabel="accuracy on 5 to 9", xlim=(0, 1))
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
