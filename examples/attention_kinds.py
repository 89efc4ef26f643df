"""Three kinds of attention over modalities, and whether they look away from the one that is broken.

Image, sound and text of a digit arrive, and in each event one of the three is replaced by noise. An attention pool
makes one vector of the three and says how much each counted. Additive attention scores a modality by a small network
(Bahdanau et al., 2015), multiplicative attention by its product with a query (Luong et al., 2015), and split attention
gives every feature a softmax of its own over the modalities (Zhang et al., ResNeSt, 2020). Nobody tells the model which
modality is noise: it is trained on the digit alone. If attention is of any use, a broken modality counts less than the
same modality does when it is whole.

    python examples/attention_kinds.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from torch import nn

WIDTH, SCORE = 32, 16
MODALITIES = ["image", "sound", "text"]
KINDS = ["additive", "multiplicative", "split"]


class Pooled(nn.Module):
    def __init__(self, ops, kind: str, sizes: list[int]) -> None:
        super().__init__()
        self.ops, self.kind = ops, kind
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU()) for size in sizes)
        self.first = nn.Linear(WIDTH, WIDTH if kind == "multiplicative" else SCORE)
        self.second = nn.Linear(SCORE, len(sizes) * WIDTH)
        self.vector = nn.Parameter(torch.randn(WIDTH if kind == "multiplicative" else SCORE))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, xs):
        """Logits [B, 10] and the share of each modality [B, M]."""
        xs = torch.stack([encoder(x) for encoder, x in zip(self.encoders, xs, strict=True)], 1)  # [B, M, WIDTH]
        if self.kind == "additive":
            pooled, weights = self.ops.additive_attention_pool(xs, self.first.weight, self.vector, bias=self.first.bias)
        elif self.kind == "multiplicative":
            query = self.vector.expand(len(xs), -1)
            pooled, weights = self.ops.multiplicative_attention_pool(xs, query, weight=self.first.weight)
        else:
            layers = (self.first.weight, self.first.bias, self.second.weight, self.second.bias)
            pooled, weights = self.ops.split_attention_pool(xs, *layers)
            weights = weights.mean(-1)
        return self.head(pooled), weights

    def loss(self, xs, label):
        return nn.functional.cross_entropy(self(xs)[0], label)


def corrupt(xs: list[torch.Tensor], broken: torch.Tensor) -> list[torch.Tensor]:
    """Noise instead of modality `broken[b]` in row b."""
    noise = [2 * torch.randn_like(x) for x in xs]
    return [torch.where((broken == m)[:, None], n, x) for m, (n, x) in enumerate(zip(noise, xs, strict=True))]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=len(KINDS))
    train, test = data.split(data.draw_events(noise=0.2, loudness=0.5, errors=1))
    sizes = [x.shape[-1] for x in train.features()]

    def batch(step: int):
        rows = torch.randperm(len(train))[:64]
        return corrupt(train[rows].features(), torch.randint(3, (64,))), train.label[rows]

    rows, shares = [], {}
    for kind in KINDS:
        model = example.train(kind, partial(Pooled, kind=kind, sizes=sizes), batch, example.steps(600, quick=250))
        shares[kind] = torch.zeros(3, 3)
        for broken, name in enumerate(MODALITIES):
            with torch.no_grad():
                logits, weights = model(corrupt(test.features(), torch.full((len(test),), broken)))
            shares[kind][broken] = weights.mean(0)
            rows.append([kind, name, *weights.mean(0).tolist(), accuracy(logits, test.label)])
    example.table(["attention", "broken", *(f"weight of {name}" for name in MODALITIES), "accuracy"], rows)
    for kind in KINDS:
        broken = shares[kind].diagonal()
        whole = (shares[kind].sum(0) - broken) / 2  # the modality's mean weight where another is broken
        example.check(f"{kind}: a broken modality counts less than a whole one", bool(broken.mean() < whole.mean()))
    with example.picture(1, 3, size=(8, 2.8)) as axes:
        for axis, kind in zip(axes, KINDS, strict=True):
            axis.imshow(shares[kind].tolist(), vmin=0, vmax=2, cmap="Blues")
            axis.set_xticks(range(3), MODALITIES)
            axis.set_yticks(range(3), MODALITIES)
            axis.set(title=kind, xlabel="weight of")
            for i in range(3):
                for j in range(3):
                    axis.text(j, i, f"{shares[kind][i, j]:.2f}", ha="center", va="center")
        axes[0].set_ylabel("broken")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
