"""Small changes that fool a fused model: one sense attacked or all, and training against it.

An attacker who knows the gradient moves each input a little in the direction that hurts most: in one step (FGSM;
Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015) or in many small ones (PGD; Madry et al.,
Towards Deep Learning Models Resistant to Adversarial Attacks, 2018). The attack goes through the fused op's backward,
so it also tests it: its gradient for the inputs must be plain torch's. A fused model that loses one sense to the
attacker still has the others; one trained on attacked inputs gives up little accuracy and keeps far more of it under
attack.

    python examples/adversarial.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data, plain
from torch import Tensor, nn

WIDTH, REACH, STEPS = 32, 0.15, 5  # how far each input may be moved, and in how many steps of PGD
NAMES = ["image", "sound", "text"]


class Gated(nn.Module):
    def __init__(self, ops, sizes: list[int], hardened: bool = False) -> None:
        super().__init__()
        self.ops, self.hardened = ops, hardened
        self.values = nn.ModuleList(nn.Linear(size, WIDTH) for size in sizes)
        self.gate = nn.Linear(sum(sizes), len(sizes) * WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, xs):
        weights, biases = [v.weight for v in self.values], [v.bias for v in self.values]
        return self.head(self.ops.gated_fusion(xs, weights, biases, self.gate.weight, self.gate.bias))

    def loss(self, xs, label):
        attacked = attack(self, xs, label, NAMES, steps=1) if self.hardened else xs
        return nn.functional.cross_entropy(self(attacked), label)


def gradients(model: nn.Module, xs: list[Tensor], label: Tensor) -> tuple[Tensor, ...]:
    xs = [x.detach().requires_grad_() for x in xs]
    return torch.autograd.grad(nn.functional.cross_entropy(model(xs), label), xs)


def attack(model: nn.Module, xs: list[Tensor], label: Tensor, senses: list[str], steps: int) -> list[Tensor]:
    """Each of the senses moved by at most REACH: FGSM for one step, else PGD."""
    stride = REACH if steps == 1 else 2 * REACH / steps
    moved = xs
    for _ in range(steps):
        uphill = gradients(model, moved, label)
        moved = [
            torch.clamp(m + stride * g.sign(), x - REACH, x + REACH) if name in senses else x
            for name, x, m, g in zip(NAMES, xs, moved, uphill, strict=True)
        ]
    return moved


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=2)
    train, test = data.split(data.draw_events(noise=0.2, loudness=0.5, errors=1))
    sizes, steps = [x.shape[1] for x in train.features()], example.steps(500, quick=150)
    naive = example.train("plain training", partial(Gated, sizes=sizes), data.batches(train), steps)
    hardened = partial(Gated, sizes=sizes, hardened=True)
    hard = example.train("adversarial training", hardened, data.batches(train), steps)

    twin = Gated(plain, sizes)
    twin.load_state_dict(naive.state_dict())
    pairs = zip(
        gradients(naive, test.features(), test.label), gradients(twin, test.features(), test.label), strict=True
    )
    apart = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    example.check(f"the inputs' gradients are plain torch's (relative difference {apart:.0e})", apart < 1e-4)

    rows, scores = [], {}
    asked = [*([name] for name in NAMES), NAMES]
    cases = [("none", [], 1), *(("FGSM", senses, 1) for senses in asked), *(("PGD", senses, STEPS) for senses in asked)]
    for kind, senses, count in cases:
        found = []
        for model in (naive, hard):
            attacked = attack(model, test.features(), test.label, senses, count)
            found.append(accuracy(model(attacked), test.label))
        scores[f"{kind}\n{', '.join(senses) if len(senses) < 3 else 'all'}"] = found
        rows.append([kind, ", ".join(senses) or "-", *found])
    example.table(["attack", "on", "accuracy", "adversarially trained"], rows)
    clean, every, worst = rows[0], rows[4], rows[8]
    for kind, single, all_three in (("FGSM", rows[1:4], every), ("PGD", rows[5:8], worst)):
        least = min(row[2] for row in single)
        example.check(f"{kind} on one sense hurts less than on all", least > all_three[2])
    example.check("adversarial training keeps more under the strongest attack", worst[3] > worst[2])
    example.check("and gives up at most 5 points where nobody attacks", clean[3] > clean[2] - 0.05)
    with example.picture(size=(8, 3)) as axes:
        for offset, column, name in ((-0.2, 0, "plainly trained"), (0.2, 1, "adversarially trained")):
            axes.bar([i + offset for i in range(len(cases))], [s[column] for s in scores.values()], 0.4, label=name)
        axes.set_xticks(range(len(cases)), list(scores))
        axes.set(ylabel="accuracy", ylim=(0, 1), xlabel="attack, and what it changes")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
