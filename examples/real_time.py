"""A stream with a deadline: senses arrive late or never, and each frame needs an answer.

Every 20 ms a camera, a microphone and a keyboard report on a digit, each after a while of its own, or not at all. What
has not come after 18 ms is too late: 2 ms are left for the answer. `concat_linear` is told who is present and reads
nobody else, so the one model serves every case (Ma et al., Are Multimodal Transformers Robust to Missing Modality?,
2022). At batch 1 a model is bound by the calls, not by arithmetic: what counts is not the mean but the tail (Dean &
Barroso, The Tail at Scale, 2013), so p50, p99, their distance (jitter) and the deadlines missed are shown for both sets
of ops.

    python examples/real_time.py
"""

from __future__ import annotations

import sys
import time
from functools import partial

import torch
from common import Example, accuracy, data, plain
from torch import nn

WIDTH, DUE, DEADLINE, LOST = 256, 0.018, 0.002, 0.04  # seconds to report in and to answer in, share never reported
SENSES = ["image", "sound", "text"]
TURN = 10  # frames in a row that one model answers; two models in turn would push each other out of the cache


class Stream(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops = ops
        self.join, self.head = nn.Linear(sum(sizes), WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, xs, presence):
        joined = self.ops.concat_linear(xs, self.join.weight, self.join.bias, activation="relu", presence=presence)
        return self.head(joined)

    def loss(self, xs, presence, label):
        return nn.functional.cross_entropy(self(xs, presence), label)


def arrivals(count: int, lost: float = LOST) -> torch.Tensor:
    """(count, 3): seconds until each sense reports, infinite where it never does."""
    after = 0.004 + torch.empty(count, 3).exponential_(1 / 0.005)
    return after.masked_fill(torch.rand(count, 3) < lost, torch.inf)


def in_time(after: torch.Tensor) -> torch.Tensor:
    """(count, 3) bool; where none is, the first to come is waited for."""
    first = torch.arange(3) == after.argmin(1, keepdim=True)
    return torch.where((after < DUE).any(1, keepdim=True), after < DUE, first)


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    train, test = data.split(data.draw_events(noise=0.3, loudness=1.0, errors=1))
    sizes = [x.shape[1] for x in train.features()]
    draw = data.batches(train)

    def batch(step: int):
        xs, label = draw(step)
        return xs, in_time(arrivals(len(label), lost=0.3)), label  # a model that must do without learns to

    ours = example.train("stream", partial(Stream, sizes=sizes), batch, example.steps(300, quick=120))
    torchs = Stream(plain, sizes).eval()
    torchs.load_state_dict(ours.state_dict())
    models = {"mmkernels": ours, "torch": torchs}
    taken, answers = {name: [] for name in models}, {name: [] for name in models}
    after, senses = arrivals(len(test)), test.features()
    presence, lost = in_time(after), after.isinf()
    shares = torch.stack([presence, ~presence & ~lost, ~presence & lost], -1).float().mean(0).tolist()
    example.table(["sense", "in time", "late", "lost"], [[n, *row] for n, row in zip(SENSES, shares, strict=True)])
    with torch.inference_mode():
        for begin in range(0, len(test), TURN):
            for name in sorted(models, reverse=bool(begin // TURN % 2)):
                for i in range(begin, min(begin + TURN, len(test))):
                    frame = [x[i : i + 1] for x in senses]
                    start = time.perf_counter()
                    answers[name].append(models[name](frame, presence[i : i + 1]))
                    taken[name].append(time.perf_counter() - start)
    rows = []
    for name in models:
        p50, p99 = torch.tensor(taken[name]).quantile(torch.tensor([0.5, 0.99])).tolist()
        late = sum(seconds > DEADLINE for seconds in taken[name])
        figures = [f"{1e6 * figure:.0f}" for figure in (p50, p99, p99 - p50)]
        rows.append([name, *figures, late, accuracy(torch.cat(answers[name]), test.label)])
    example.table(["microseconds a frame", "p50", "p99", "jitter", f"over {1e3 * DEADLINE:.0f} ms", "accuracy"], rows)
    ours_said, torch_said = torch.cat(answers["mmkernels"]), torch.cat(answers["torch"])
    apart = (ours_said - torch_said).abs().max().item()
    example.check(f"frame by frame the same answers (difference {apart:.0e})", apart < 1e-4)
    whole = presence.all(1)
    rows = [
        ["all senses", accuracy(ours_said[whole], test.label[whole])],
        *(
            [f"no {name}", accuracy(ours_said[~presence[:, m]], test.label[~presence[:, m]])]
            for m, name in enumerate(SENSES)
        ),
    ]
    example.table(["frame", "accuracy"], rows)
    example.check("with a sense missing the answer is still right in most frames", all(row[1] > 0.5 for row in rows))
    with example.picture() as axes:
        for name in models:
            axes.plot(
                sorted(1e6 * seconds for seconds in taken[name]), torch.linspace(0, 1, len(test)).tolist(), label=name
            )
        axes.set(xlabel="microseconds a frame", ylabel="share of frames done", xscale="log")
        axes.legend()
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
