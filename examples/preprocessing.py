"""What a model learns depends on what it is fed: feature extraction, cleaning and augmentation, one after the other.

Four hundred events were collected carelessly. Files broke off and are NaN; a loose cable multiplied some pictures by
thirty; and an importer stored twenty events twenty times, under wrong labels. Features replace the waveform by its
log-mel spectrum, which does not care when a speaker began. Cleaning drops what is not finite, keeps one of each
duplicate (Lee et al., Deduplicating Training Data Makes Language Models Better, 2022) and what lies within a few median
deviations of the rest. Augmentation shows each event differently every time: pictures shifted by a pixel, voices under
noise (as in Park et al., SpecAugment, 2019) and letters mistyped, since that is what will come, from other speakers.
The same model, `concat_linear` and a layer, is trained after each step.

    python examples/preprocessing.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from common import Example, accuracy, data, words
from common.speech import SPEAKERS, WORDS, log_mel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

COLLECTED, KNOWN, WIDTH, SAMPLES = 400, 16, 64, 4000  # events, their speakers, of the model, half a second of sound
STEPS = ["as collected", "log-mel", "and cleaned", "and augmented"]


@dataclass
class Records:
    image: Tensor  # (N, 8, 8)
    sound: Tensor  # (N, SAMPLES)
    words: list[str]
    label: Tensor

    def __getitem__(self, rows: Tensor) -> Records:
        return Records(self.image[rows], self.sound[rows], [self.words[i] for i in rows.tolist()], self.label[rows])


def record(rows: Tensor, speakers: range, generator: torch.Generator) -> Records:
    """These of scikit-learn's digits, each spoken by one of `speakers` and typed without a fault."""
    digits, spoken = load_digits(), data.spoken()[0]
    label = torch.from_numpy(digits.target)[rows]
    who = torch.randint(speakers.start, speakers.stop, (len(rows),), generator=generator).tolist()
    begin = torch.randint(SAMPLES // 10, (len(rows),), generator=generator).tolist()  # nobody starts on the dot
    waves = [F.pad(spoken[d][w], (b, SAMPLES))[:SAMPLES] for d, w, b in zip(label.tolist(), who, begin, strict=True)]
    sound = torch.stack(waves) + 0.3 * torch.randn(len(rows), SAMPLES, generator=generator)
    return Records(torch.from_numpy(digits.images)[rows].float() / 16, sound, [WORDS[d] for d in label], label)


def spoil(records: Records, generator: torch.Generator) -> Records:
    """Broken files, a loose cable, and an importer's duplicates under wrong labels."""
    count = len(records.label)
    fate = torch.rand(count, generator=generator)
    sound = records.sound.masked_fill((fate < 0.1)[:, None], torch.nan)
    image = torch.where(((fate > 0.1) & (fate < 0.3))[:, None, None], 30 * records.image, records.image)
    again = torch.cat([torch.arange(count), torch.arange(count - 20, count).repeat(20)])
    label = torch.where(torch.arange(count) < count - 20, records.label, (records.label + 1) % 10)
    return replace(records, image=image, sound=sound, label=label)[again]


def clean(records: Records) -> Records:
    whole = records.image.isfinite().all(2).all(1) & records.sound.isfinite().all(1)
    records = records[whole.nonzero()[:, 0]]
    _, which = records.image.flatten(1).unique(dim=0, return_inverse=True)
    first = torch.stack([(which == i).nonzero()[0, 0] for i in range(int(which.max()) + 1)])
    records = records[first]
    height = records.image.flatten(1).mean(1)
    deviation = (height - height.median()).abs()
    return records[(deviation < 8 * deviation.median()).nonzero()[:, 0]]


def vary(records: Records, generator: torch.Generator) -> Records:
    """As things are outside the laboratory, differently each time."""
    count, shift = len(records.label), torch.randint(-1, 2, (len(records.label), 2), generator=generator)
    grid = torch.arange(8)
    rows, columns = grid[:, None] - shift[:, :1, None], grid - shift[:, 1:, None]
    inside = (rows >= 0) & (rows < 8) & (columns >= 0) & (columns < 8)
    moved = records.image[torch.arange(count)[:, None, None], rows.clamp(0, 7), columns.clamp(0, 7)] * inside
    image = moved + 0.2 * torch.randn(moved.shape, generator=generator)
    sound = records.sound + 0.8 * torch.randn(records.sound.shape, generator=generator)
    return Records(image, sound, [data.misspelt(word, 2, generator) for word in records.words], records.label)


def features(records: Records, mel: bool) -> list[Tensor]:
    sound = log_mel(records.sound).flatten(1) / 5 if mel else records.sound
    return [records.image.flatten(1), sound, words.letter_pairs(records.words)]


class Joined(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops, self.join, self.head = ops, nn.Linear(sum(sizes), WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, xs):
        return self.head(self.ops.concat_linear(xs, self.join.weight, self.join.bias, activation="relu"))

    def loss(self, xs, label):
        return F.cross_entropy(self([x.nan_to_num() for x in xs]), label)


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=len(STEPS))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(1797, generator=generator)
    collected = spoil(record(order[:COLLECTED], range(KNOWN), generator), generator)
    kept, test = clean(collected), vary(record(order[-600:], range(KNOWN, SPEAKERS), generator), generator)
    rows = []
    for name in STEPS:
        records, mel, varied = kept if "and" in name else collected, name != STEPS[0], name == STEPS[-1]
        given = features(records, mel)

        def batch(step: int, records=records, mel=mel, varied=varied, given=given):
            rows = torch.randint(len(records.label), (48,))
            if varied:
                return features(vary(records[rows], generator), mel), records.label[rows]
            return [x[rows] for x in given], records.label[rows]

        make = partial(Joined, sizes=[x.shape[1] for x in given])
        model = example.train(name, make, batch, example.steps(200, quick=150))
        asked = features(test, mel)
        alone = [[x if i == j else torch.zeros_like(x) for j, x in enumerate(asked)] for i in range(3)]
        rows.append([name, len(records.label), *(accuracy(model(xs), test.label) for xs in [asked, *alone])])
    example.table(["data", "events", "accuracy", "by image alone", "by sound alone", "by text alone"], rows)
    scores = [row[2] for row in rows]
    example.check("every step of preparation helps", all(a < b for a, b in pairwise(scores)))
    example.check("all of them together by more than 15 points", scores[-1] > scores[0] + 0.15)
    with example.picture(size=(6, 2.4)) as axes:
        axes.barh(STEPS, scores, color=["0.6", "C0", "C0", "C2"])
        axes.invert_yaxis()
        axes.set(xlabel="accuracy outside the laboratory", xlim=(0, 1))
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
