"""A small student of one modality learns from a large teacher of three.

At home there is a camera, in the laboratory there were a camera, a microphone and a keyboard. A teacher that sees,
hears and reads is trained first. A student that only sees, with a tenth of the parameters, then learns the teacher's
whole distribution, not just its verdict (Hinton et al., Distilling the Knowledge in a Neural Network, 2015), on many
images that nobody labelled: 100 are labelled, the teacher speaks for the rest. The same student, trained on the labels
alone, says what the teacher was worth. `distillation_loss` computes the divergence in one pass over the logits.

    python examples/distillation.py
"""

from __future__ import annotations

import sys
import time
from functools import partial

import torch
from common import Example, accuracy, data
from torch import nn

TEACHER, STUDENT, LABELLED, TEMPERATURE = 128, 24, 100, 2.0


class Teacher(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops = ops
        self.join, self.head = nn.Linear(sum(sizes), TEACHER), nn.Linear(TEACHER, 10)

    def forward(self, xs):
        return self.head(self.ops.concat_linear(xs, self.join.weight, self.join.bias, activation="relu"))

    def loss(self, xs, label):
        return nn.functional.cross_entropy(self(xs), label)


class Student(nn.Module):
    """Reads the image only; learns from the teacher's logits where it is given them, else from labels."""

    def __init__(self, ops, pixels: int, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.ops, self.teach = ops, None if teacher is None else teacher.forward
        self.layers = nn.Sequential(nn.Linear(pixels, STUDENT), nn.ReLU(), nn.Linear(STUDENT, 10))

    def forward(self, xs):
        return self.layers(xs[0])

    def loss(self, xs, label):
        if self.teach is None:
            return nn.functional.cross_entropy(self(xs), label)
        with torch.no_grad():
            taught = self.teach(xs)
        return self.ops.distillation_loss(self(xs), taught, temperature=TEMPERATURE)


@torch.no_grad()
def latency(model: nn.Module, xs: list[torch.Tensor], repeats: int = 200) -> float:
    """Microseconds for one event, the best of many."""
    one, taken = [x[:1] for x in xs], []
    for _ in range(repeats):
        start = time.perf_counter()
        model(one)
        taken.append(time.perf_counter() - start)
    return 1e6 * min(taken)


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=3)
    train, test = data.split(data.draw_events(noise=0.3, loudness=1.0, errors=1))
    labelled = train[:LABELLED]
    sizes = [x.shape[1] for x in train.features()]
    steps = example.steps(600, quick=250)
    teacher = example.train("teacher", partial(Teacher, sizes=sizes), data.batches(train), steps).requires_grad_(False)
    alone = example.train("student alone", partial(Student, pixels=sizes[0]), data.batches(labelled), steps)
    taught = example.train(
        "student of the teacher", partial(Student, pixels=sizes[0], teacher=teacher), data.batches(train), steps
    )
    models = {"teacher, three modalities": teacher, f"student, {LABELLED} labels": alone, "student, taught": taught}
    rows, scores = [], {}
    for name, model in models.items():
        scores[name] = accuracy(model(test.features()), test.label)
        size = sum(p.numel() for p in model.parameters())
        rows.append([name, scores[name], size, f"{latency(model, test.features()):.0f}"])
    example.table(["model", "accuracy", "parameters", "microseconds"], rows)
    best, poor, good = scores.values()
    example.check("the teacher, which sees more, is the best", best > max(poor, good))
    example.check("the taught student is better than the one with labels alone", good > poor + 0.02)
    example.check("the student has less than a tenth of the parameters", 10 * rows[2][2] < rows[0][2])
    with example.picture(size=(6, 2.4)) as axes:
        axes.barh(list(scores), list(scores.values()), color=["C0", "0.6", "C1"])
        axes.set(xlabel="accuracy on unseen digits", xlim=(0, 1))
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
