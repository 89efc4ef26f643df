"""Losses of many modalities: who is heard, who is too loud, and whom to believe when labels lie.

Balance: a modality that learns easily starves the others. Losses can be weighted by hand, by learnt uncertainties
(Kendall et al., 2018), or the gradient of the modality that is ahead is damped (OGM-GE; Peng et al., 2022).
Interpretability: each modality's share of the gradient says who is learning; it is plotted for all three. Robustness:
with 30 % of the labels wrong, cross-entropy learns the lies by heart, and generalised cross-entropy (Zhang & Sabuncu,
2018), which trusts a sample less the less the model believes it, does not.

    python examples/losses.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from torch import nn

WIDTH, CLASSES, ALPHA = 64, 10, 1.0
BALANCES = ["given", "uncertainty", "OGM-GE"]


class Judges(nn.Module):
    """A classifier a modality, and a loss of all."""

    def __init__(self, ops, sizes: list[int], balance: str = "given", robust: str | None = None) -> None:
        super().__init__()
        self.ops, self.balance, self.robust = ops, balance, robust
        layers = [(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)) for size in sizes]
        self.judges = nn.ModuleList(nn.Sequential(*each) for each in layers)
        self.log_vars = nn.Parameter(torch.zeros(len(sizes)))

    def forward(self, xs):
        return [judge(x) for judge, x in zip(self.judges, xs, strict=True)]

    def loss(self, xs, label):
        logits = self(xs)
        if self.robust:
            return self.ops.multimodal_cross_entropy(logits, label, robust=self.robust, q=0.7)[0]
        if self.balance == "uncertainty":
            return self.ops.multimodal_cross_entropy(logits, label, log_vars=self.log_vars)[0]
        if self.balance == "OGM-GE":
            return self.ops.multimodal_cross_entropy(logits, label, modulation=damping(logits, label))[0]
        weights = torch.ones(len(logits)) / len(logits)
        return self.ops.multimodal_cross_entropy(logits, label, weights=weights)[0]


def damping(logits: list[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
    """1 − tanh(α ρ) for modalities that are ahead of the others' mean by ρ > 1, else 1 (OGM-GE's equation 10)."""
    right = torch.stack([z.detach().softmax(-1).gather(1, label[:, None]).sum() for z in logits])
    ahead = right * (len(logits) - 1) / (right.sum() - right)
    return torch.where(ahead > 1, 1 - torch.tanh(ALPHA * ahead), torch.ones(()))


def gradient_shares(model: Judges, batch: tuple) -> torch.Tensor:
    """(M,): each modality's share of the gradient's norm."""
    gradients = [torch.autograd.grad(model.loss(*batch), list(judge.parameters())) for judge in model.judges]
    norms = torch.stack([sum(g.square().sum() for g in each).sqrt() for each in gradients])
    return norms / norms.sum()


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=5)
    train, test = data.split(data.draw_events(noise=0.5, loudness=2.0, errors=0))  # the text is far too easy
    sizes = [x.shape[-1] for x in train.features()]
    names = ["image", "sound", "text"]
    lies = torch.where(torch.rand(len(train)) < 0.3, torch.randint(10, (len(train),)), train.label)
    false = lies != train.label

    rows, early = [], {}
    probe = (train[:256].features(), train.label[:256])
    for balance in BALANCES:
        model = example.train(balance, partial(Judges, sizes=sizes, balance=balance), data.batches(train), 30)
        early[balance] = gradient_shares(model, probe)
        shares = [f"{share:.0%}" for share in early[balance].tolist()]
        rows.append([balance, *shares, *(accuracy(z, test.label) for z in model(test.features()))])
    example.table(["balance", *(f"gradient of {n}" for n in names), *(f"accuracy of {n}" for n in names)], rows)
    example.check(
        "OGM-GE lowers the gradient share of the modality that is ahead",
        bool(early["OGM-GE"][2] < early["given"][2]),
    )

    rows, curves = [], {}
    for name, robust in (("cross-entropy", None), ("generalised cross-entropy", "gce")):
        make = partial(Judges, sizes=sizes, robust=robust)
        model = example.train(
            f"{name}, 30 % wrong", make, data.batches(train, label=lies), example.steps(1600, quick=1200)
        )
        curves[name] = [accuracy(z, test.label) for z in model(test.features())]
        learnt = sum(accuracy(z[false], lies[false]) for z in model(train.features())) / 3
        rows.append([name, *curves[name], learnt])
    example.table(["loss", *(f"accuracy of {n}" for n in names), "agreement with the false labels"], rows)
    mean = {name: sum(scores) / 3 for name, scores in curves.items()}
    example.check(
        "with 30 % of the labels wrong, generalised cross-entropy is right more often",
        mean["generalised cross-entropy"] > mean["cross-entropy"],
    )
    with example.picture(1, 2, size=(8, 3)) as axes:
        left = torch.zeros(3)
        for m, name in enumerate(names):
            width = torch.stack([early[b][m] for b in BALANCES])
            axes[0].barh(BALANCES, width.tolist(), left=left.tolist(), label=name)
            left = left + width
        axes[0].set(xlabel="share of the gradient", xlim=(0, 1))
        axes[0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        for offset, (name, scores) in zip((-0.2, 0.2), curves.items(), strict=True):
            axes[1].bar([m + offset for m in range(3)], scores, 0.4, label=name)
        axes[1].set_xticks(range(3), names)
        axes[1].set(ylabel="accuracy", xlabel="trained with 30 % of the labels wrong", ylim=(0, 1))
        axes[1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize="x-small")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
