"""Classes known from one, five or twenty examples: prototypes in a space where the senses agree.

The digits 0 to 6 teach an embedding: what a digit looks like and what it sounds like are drawn together, and apart from
all other digits (supervised contrastive learning; Khosla et al., 2020; CLIP's loss where every pair is alone; Radford
et al., 2021). The digits 7 to 9 were never seen. Given a few examples of each, a class is the mean of their embeddings,
and a new event belongs to the nearest (Snell et al., Prototypical Networks, 2017). From five examples on, image and
sound together are better than either alone. Seven digits are few to learn from: the raw features, seven times as many
numbers, stay ahead. `contrastive_loss` never holds the table of all pairs.

    python examples/few_shots.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, data
from torch import Tensor, nn
from torch.nn.functional import normalize

WIDTH, KNOWN, SHOTS, ROUNDS = 32, 7, (1, 5, 20), 40


class Embedding(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops = ops
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, WIDTH)) for size in sizes
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, xs):
        return [normalize(encoder(x), dim=-1) for encoder, x in zip(self.encoders, xs, strict=True)]

    def loss(self, xs, label):
        image, sound = self(xs)
        return self.ops.contrastive_loss(image, sound, self.log_scale.exp(), labels=label)


def seen_and_heard(events: data.Events) -> list[Tensor]:
    return events.features()[:2]


def by_prototypes(embedded: Tensor, label: Tensor, shots: int) -> float:
    """Mean accuracy over ROUNDS draws of `shots` examples a class; the rest is asked."""
    right = []
    for _ in range(ROUNDS):
        order = torch.randperm(len(label))
        groups = [order[label[order] == digit] for digit in range(KNOWN, 10)]
        prototypes = torch.stack([embedded[group[:shots]].mean(0) for group in groups])
        asked = torch.cat([group[shots:] for group in groups])
        nearest = torch.cdist(embedded[asked], prototypes).argmin(1) + KNOWN
        right.append((nearest == label[asked]).float().mean().item())
    return sum(right) / ROUNDS


@torch.no_grad()
def scatter(axes, embedded: Tensor, label: Tensor) -> None:
    """The first two principal components, a colour for each class."""
    plane = (embedded - embedded.mean(0)) @ torch.linalg.svd(embedded - embedded.mean(0)).Vh[:2].T
    for digit in range(KNOWN, 10):
        axes.scatter(*plane[label == digit].T.tolist(), s=8, label=str(digit))
    axes.set(title="digits never trained on", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    events = data.draw_events(noise=0.1, loudness=3.0)
    known, fresh = events[events.label < KNOWN], events[events.label >= KNOWN]
    make = partial(Embedding, sizes=[x.shape[1] for x in seen_and_heard(events)])
    model = example.train(
        "embedding", make, data.batches(known, seen_and_heard, size=128), example.steps(200, quick=100), lr=2e-3
    )
    with torch.no_grad():
        image, sound = model(seen_and_heard(fresh))
    spaces = {
        "raw pixels and sound": torch.cat([x / x.norm(dim=1).mean() for x in seen_and_heard(fresh)], 1),
        "image": image,
        "sound": sound,
        "image and sound": torch.cat([image, sound], 1),
    }
    scores = {name: [by_prototypes(space, fresh.label, shots) for shots in SHOTS] for name, space in spaces.items()}
    example.table(["nearest prototype in", *(f"{n} a class" for n in SHOTS)], [[k, *v] for k, v in scores.items()])
    both = scores["image and sound"]
    pairs = list(zip(both, scores["image"], scores["sound"], strict=True))[1:]
    example.check("from five examples on, both senses beat either alone", all(b > max(i, s) for b, i, s in pairs))
    example.check("more examples help", both[0] < both[1] < both[2])
    example.check("three unseen digits are told apart far above chance", both[0] > 0.5)
    with example.picture(1, 2, size=(8, 3)) as axes:
        for name, score in scores.items():
            axes[0].plot(SHOTS, score, marker="o", label=name)
        axes[0].set(xscale="log", xlabel="examples a class", ylabel="accuracy", xticks=SHOTS, xticklabels=SHOTS)
        axes[0].legend(loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=2, fontsize="small")
        scatter(axes[1], spaces["image and sound"], fresh.label)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
