"""One sense helps another: gates and attention that let sound through when the image is of no use.

An image is drowned in noise, from none to three times its contrast; nobody says how much. The sound of the same digit
may help in three ways. `gated_concat` lets a gate, which sees both, close on the image's features before they are
joined. `gated_fusion` weighs the two against each other, feature by feature (Arevalo et al., Gated Multimodal Units,
2017). And cross-attention lets rows of the image read frames of the sound (Tsai et al., Multimodal Transformer, 2019).
Beside them stands the image alone. What a gate has learnt can be read off: here it closes the more, the more noise
there is, though it was only ever told which digit it was.

    python examples/gates.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from common.speech import BANDS
from torch import Tensor, nn

WIDTH, HEADS, ROWS = 32, 4, 8
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]  # of noise, in units of the image's range
KINDS = ["image alone", "gated concatenation", "gated fusion", "cross-attention"]


class Helped(nn.Module):
    def __init__(self, ops, kind: str) -> None:
        super().__init__()
        self.ops, self.kind = ops, kind
        self.see = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU())
        self.hear = nn.Sequential(nn.Linear(data.FRAMES * BANDS, WIDTH), nn.ReLU())
        joined = {"gated concatenation": 2 * WIDTH + 1, "cross-attention": 2 * ROWS * WIDTH}.get(kind, WIDTH)
        self.head = nn.Sequential(nn.Linear(joined, 64), nn.ReLU(), nn.Linear(64, 10))
        if "gated" in kind:
            self.gate = nn.Linear(2 * WIDTH, WIDTH)
        if kind == "gated fusion":
            self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        if kind == "cross-attention":
            self.row, self.frame = nn.Linear(8, WIDTH), nn.Linear(BANDS, WIDTH)
            self.place, self.time = (nn.Parameter(0.3 * torch.randn(n, WIDTH)) for n in (ROWS, data.FRAMES))
            self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, image, sound):
        if self.kind == "cross-attention":
            rows = (self.row(image.unflatten(-1, (ROWS, 8))) + self.place).relu()
            frames = (self.frame(sound.unflatten(-1, (data.FRAMES, BANDS))) + self.time).relu()
            query = self.query(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            key, value = self.key_value(frames).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
            read = self.ops.cross_attention(query, key, value).transpose(1, 2).flatten(2)
            return self.head(torch.cat([rows, read], -1).flatten(1))
        seen, heard = self.see(image), self.hear(sound)
        if self.kind == "gated concatenation":
            seen = self.ops.gated_concat(seen, heard, self.gate.weight, self.gate.bias)
        elif self.kind == "gated fusion":
            weights, biases = zip(*[(v.weight, v.bias) for v in self.values], strict=True)
            seen = self.ops.gated_fusion([seen, heard], list(weights), list(biases), self.gate.weight, self.gate.bias)
        return self.head(seen)

    def openness(self, image, sound) -> Tensor:
        """[B]: how far the gate is open for the image, on average over its features."""
        return self.gate(torch.cat([self.see(image), self.hear(sound)], -1)).sigmoid().mean(-1)

    def loss(self, image, sound, label):
        return nn.functional.cross_entropy(self(image, sound), label)


def drown(events: data.Events, level: Tensor) -> list[Tensor]:
    """The image under noise of `level` [B], and the sound."""
    image, sound, _ = events.features()
    return [image + level[:, None] * torch.randn_like(image), sound]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=len(KINDS))
    train, test = data.split(data.draw_events(loudness=2.0))

    def batch(step: int):
        rows = torch.randint(len(train), (64,))
        return *drown(train[rows], LEVELS[-1] * torch.rand(64)), train.label[rows]

    rows, scores, open_at = [], {}, {}
    for kind in KINDS:
        model = example.train(kind, partial(Helped, kind=kind), batch, example.steps(700, quick=500))
        with torch.no_grad():
            views = [drown(test, torch.full((len(test),), level)) for level in LEVELS]
            scores[kind] = [accuracy(model(*view), test.label) for view in views]
            if "gated" in kind:
                open_at[kind] = [model.openness(*view).mean().item() for view in views]
        rows.append([kind, *scores[kind]])
    example.table(["accuracy at noise", *map(str, LEVELS)], rows)
    example.table(["gate open for the image", *map(str, LEVELS)], [[kind, *o] for kind, o in open_at.items()])
    for kind in KINDS[1:]:
        example.check(f"{kind}: sound helps where the image drowns", scores[kind][-1] > scores[KINDS[0]][-1] + 0.1)
    for kind, opened in open_at.items():
        example.check(f"{kind}: the gate closes as noise grows", opened[0] > opened[2] > opened[-1])
    with example.picture(1, 2, size=(8, 3)) as axes:
        for i, kind in enumerate(KINDS):
            axes[0].plot(LEVELS, scores[kind], f"C{i}", marker="o", label=kind)
            if kind in open_at:
                axes[1].plot(LEVELS, open_at[kind], f"C{i}", marker="o", label=kind)
        axes[0].set(xlabel="noise on the image", ylabel="accuracy", ylim=(0, 1))
        axes[1].set(xlabel="noise on the image", ylabel="gate open for the image")
        axes[0].legend(fontsize="small")
        axes[1].legend(fontsize="small")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
