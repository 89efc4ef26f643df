"""A diagnosis from three instruments and a report, when some of them are missing.

Scikit-learn's breast-cancer data hold ten measurements of cell nuclei, each as mean, error and worst value. The three
groups are taken as three instruments; the report is a sentence of words that a hurried reader chose, one in four of
them wrong. In half the records something is missing. A gated multimodal unit (Arevalo et al., 2017) is told what is
present: what is absent has no weight and is never read, so NaN may stand there. A doctor needs to know how sure the
model is: its probabilities are compared with how often it is right (Guo et al., On Calibration of Modern Neural
Networks, 2017).

    python examples/medicine.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, words
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

WIDTH, BINS = 16, 5
SOURCES = ["mean", "error", "worst", "report"]
WORDS = (["irregular", "dense", "invasive", "large"], ["smooth", "soft", "confined", "small"])  # malignant, benign


class Diagnosis(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops = ops
        self.values = nn.ModuleList(nn.Linear(size, WIDTH) for size in sizes)
        self.gate = nn.Linear(sum(sizes), len(sizes) * WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, xs, presence):
        weights, biases = [v.weight for v in self.values], [v.bias for v in self.values]
        return self.head(
            self.ops.gated_fusion(xs, weights, biases, self.gate.weight, self.gate.bias, presence=presence)
        )

    def loss(self, xs, presence, label):
        return nn.functional.cross_entropy(self(xs, presence), label)


def records() -> tuple[list[Tensor], Tensor]:
    """Four sources, standardised, and 0 for malignant, 1 for benign."""
    cancer = load_breast_cancer()
    measured = torch.from_numpy(cancer.data).float()
    measured = (measured - measured.mean(0)) / measured.std(0)
    label = torch.from_numpy(cancer.target).long()
    reports = []
    for benign in label.tolist():
        wrong, word = torch.rand(3) < 0.25, torch.randint(4, (3,))
        spoken = [WORDS[benign ^ int(w)][i] for w, i in zip(wrong, word.tolist(), strict=True)]
        reports.append("The mass is {}, {} and {}.".format(*spoken))
    return [*measured.split(10, 1), words.embed(reports)], label


def hide(xs: list[Tensor], presence: Tensor) -> list[Tensor]:
    """NaN wherever a source is absent."""
    return [x.masked_fill(~presence[:, i, None], torch.nan) for i, x in enumerate(xs)]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    xs, label = records()
    order = torch.randperm(len(label))
    train, test = order[:300], order[300:]
    sizes = [x.shape[1] for x in xs]

    def batch(step: int):
        rows = train[torch.randint(len(train), (64,))]
        presence = (torch.rand(64, 4) < 0.5) | (torch.rand(64, 1) < 0.5)
        presence[torch.arange(64), torch.randint(4, (64,))] = True  # one at least
        return hide([x[rows] for x in xs], presence), presence, label[rows]

    model = example.train("gated fusion", partial(Diagnosis, sizes=sizes), batch, example.steps(500, quick=200))

    @torch.no_grad()
    def judged(*present: str) -> Tensor:
        presence = torch.tensor([name in present for name in SOURCES]).expand(len(test), -1)
        return model(hide([x[test] for x in xs], presence), presence)

    shown = [SOURCES, *([name] for name in SOURCES), *([s for s in SOURCES if s != name] for name in SOURCES)]
    rows = []
    for present in shown:
        logits = judged(*present)
        missed = ((logits.argmax(-1) == 1) & (label[test] == 0)).sum().item()
        rows.append([", ".join(present), accuracy(logits, label[test]), missed])
    example.table(["present", "accuracy", "cancers missed"], rows)
    example.check("all sources together are right in more than 90 %", rows[0][1] > 0.9)
    example.check("and more often than the report alone", rows[0][1] > rows[4][1])
    example.check("what is absent is never read: NaN there leaves all finite", all(r[1] > 0.5 for r in rows))

    logits = torch.cat([judged(*present) for present in shown])
    confidence, right = logits.softmax(-1).max(-1).values, logits.argmax(-1) == label[test].repeat(len(shown))
    place = ((confidence - 0.5) * 2 * BINS).long().clamp_max(BINS - 1)
    bins = [(confidence[place == b].mean().item(), right[place == b].float().mean().item()) for b in range(BINS)]
    share = torch.bincount(place, minlength=BINS) / len(place)
    error = sum(s * abs(c - r) for s, (c, r) in zip(share.tolist(), bins, strict=True))
    example.check(f"confidence is within 0.1 of accuracy on average (it is {error:.3f} off)", error < 0.1)

    worse = torch.linspace(0, 1, 9)  # a patient whose measurements drift from the healthiest to the illest seen
    course = []
    for step in worse:
        visit = [torch.lerp(x[label == 1].mean(0), x[label == 0].mean(0), step)[None] for x in xs]
        with torch.no_grad():
            course.append(model(visit, torch.ones(1, 4, dtype=torch.bool)).softmax(-1)[0, 0].item())
    example.check("a patient who worsens has a rising risk", course[-1] > 0.8 > 0.2 > course[0])
    with example.picture(1, 2, size=(8, 3)) as axes:
        axes[0].plot([0.5, 1], [0.5, 1], color="0.7", label="well calibrated")
        axes[0].plot(*zip(*bins, strict=True), marker="o", label="this model")
        axes[0].legend()
        axes[0].set(xlabel="confidence in the diagnosis", ylabel="share that is right", title="calibration")
        axes[1].plot(range(1, 10), course, marker="o", color="C3")
        axes[1].set(
            xlabel="visit", ylabel="risk that it is malignant", title="a patient who worsens", ylim=(-0.05, 1.05)
        )
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
