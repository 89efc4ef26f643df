"""More than accuracy: precision, recall and F1 for each class, and for each sense that is missing.

A mean hides who pays for it. The digits 8 and 9 are made rare here, one in ten of them kept, so a model can be right in
most events and still never find them. Precision says how often a verdict of a class is right, recall how many of the
class were found, F1 their harmonic mean (van Rijsbergen, Information Retrieval, 1979); the macro mean counts every
class alike. A model that fuses senses is to be measured with every sense away as well (Ma et al., Are Multimodal
Transformers Robust to Missing Modality?, 2022). The figures are scikit-learn's; the model is `gated_fusion` with
presence.

    python examples/metrics.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, data
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import nn

WIDTH, RARE, KEPT = 24, (8, 9), 0.1
NAMES = ["image", "sound", "text"]


class Gated(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops = ops
        self.values = nn.ModuleList(nn.Linear(size, WIDTH) for size in sizes)
        self.gate = nn.Linear(sum(sizes), len(sizes) * WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, xs, presence):
        weights, biases = [v.weight for v in self.values], [v.bias for v in self.values]
        fused = self.ops.gated_fusion(xs, weights, biases, self.gate.weight, self.gate.bias, presence=presence)
        return self.head(fused)

    def loss(self, xs, presence, label):
        return nn.functional.cross_entropy(self(xs, presence), label)


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    train, test = data.split(data.draw_events(noise=0.5, loudness=1.0, errors=2))
    common = torch.isin(train.label, torch.tensor(RARE)).logical_not()
    train = train[common | (torch.rand(len(train)) < KEPT)]
    draw = data.batches(train)

    def batch(step: int):
        xs, label = draw(step)
        absent = torch.randint(6, (len(label), 1))  # in half the events, one of three senses
        return xs, torch.arange(3) != absent, label

    make = partial(Gated, sizes=[x.shape[1] for x in train.features()])
    model = example.train("gated fusion", make, batch, example.steps(300, quick=150))

    @torch.no_grad()
    def verdicts(absent: int | None) -> torch.Tensor:
        presence = torch.tensor([m != absent for m in range(3)]).expand(len(test), 3)
        return model(test.features(), presence).argmax(-1)

    def scores(predicted: torch.Tensor, average: str | None) -> tuple:
        return precision_recall_fscore_support(test.label, predicted, average=average, zero_division=0)

    whole = verdicts(None)
    by_class = list(zip(*scores(whole, None), strict=True))
    header = ["precision", "recall", "F1"]
    names = data.speech.WORDS
    rows = [[name, *map(float, row[:3]), int(row[3])] for name, row in zip(names, by_class, strict=True)]
    example.table(["digit", *header, "events"], rows)
    rows = []
    for absent in (None, 0, 1, 2):
        predicted = verdicts(absent)
        macro = map(float, scores(predicted, "macro")[:3])
        missing = "none" if absent is None else NAMES[absent]
        rows.append([missing, float(accuracy_score(test.label, predicted)), *macro])
    example.table(["missing", "accuracy", *(f"macro {name}" for name in header)], rows)

    table = torch.from_numpy(confusion_matrix(test.label, whole, labels=range(10)))
    by_hand = (table.diagonal() / table.sum(1)).tolist()
    apart = max(abs(mine - row[1]) for mine, row in zip(by_hand, by_class, strict=True))
    example.check("recall is the diagonal of the confusion matrix over its row", apart < 1e-6)
    recall = torch.tensor([row[1] for row in by_class])
    rare = recall[list(RARE)].mean().item()
    usual = recall[: min(RARE)].mean().item()
    example.check(f"rare digits are found less often ({rare:.2f} against {usual:.2f})", rare < usual)
    lost = sum(row[1] for row in rows[1:]) / 3
    example.check(f"two senses are worse than three, on average ({lost:.2f})", lost < rows[0][1])
    with example.picture(1, 2, size=(8, 3.4)) as axes:
        shares = axes[0].imshow((table / table.sum(1, keepdim=True)).tolist(), cmap="Blues", vmin=0, vmax=1)
        axes[0].figure.colorbar(shares, ax=axes[0], label="share of the digit's events")
        axes[0].set(xlabel="verdict", ylabel="digit", xticks=range(10), yticks=range(10))
        axes[1].bar([row[0] for row in rows], [row[4] for row in rows], color=["C0", "0.6", "0.6", "0.6"])
        axes[1].set(xlabel="missing sense", ylabel="macro F1", ylim=(0, 1))
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
