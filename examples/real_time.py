"""A stream with a deadline: senses arrive late or never, and each frame needs an answer.

Every 20 ms a camera, a microphone and a keyboard should have reported on a digit. In one frame of five a sense is
missing or comes too late to be used; the answer cannot wait for it. `concat_linear` is told who is present and reads
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
from common import Example, accuracy, data, plain, words
from torch import nn

WIDTH, DEADLINE, MISSING = 256, 0.002, 0.2  # seconds a frame may take, share of frames in which a sense is not there
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


def arrivals(count: int) -> torch.Tensor:
    """(count, 3): which senses have reported in time; never none."""
    absent = torch.randint(3, (count,))
    return ~((torch.arange(3) == absent[:, None]) & (torch.rand(count, 1) < MISSING))


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    train, test = data.split(data.draw_events(noise=0.3, loudness=1.0, errors=1, read=words.letter_pairs))
    sizes = [x.shape[1] for x in train.features()]
    draw = data.batches(train)

    def batch(step: int):
        xs, label = draw(step)
        return xs, arrivals(len(label)), label

    ours = example.train("stream", partial(Stream, sizes=sizes), batch, example.steps(300, quick=120))
    torchs = Stream(plain, sizes).eval()
    torchs.load_state_dict(ours.state_dict())
    models = {"mmkernels": ours, "torch": torchs}
    taken, answers, presence = {name: [] for name in models}, {name: [] for name in models}, arrivals(len(test))
    senses = test.features()
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
            for m, name in enumerate(["image", "sound", "text"])
        ),
    ]
    example.table(["frame", "accuracy"], rows)
    example.check("with a sense missing the answer is still right in most frames", all(row[1] > 0.6 for row in rows))
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
