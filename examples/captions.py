"""A picture put into words, one at a time: a decoder that reads the image and what it has already said.

A rendered scene holds four shapes; its caption names them corner by corner, a colour and a shape each. The decoder's
words attend to the words before them and to all patches of the image (Vaswani et al., 2017; Xu et al., Show, Attend and
Tell, 2015). In training the whole caption is there at once and a causal mask hides what comes next. In use it is
written greedily: each step is one query to the words so far, whose keys and values are kept, and to the image, whose
keys are computed once. `cross_attention` has a way of its own for a query or two, where there is nothing to share among
rows and what counts is how fast keys are read. Both ways must give the same words; both sets of ops are timed.

    python examples/captions.py
"""

from __future__ import annotations

import sys

import torch
from common import Example, scenes
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 24, 8
WORDS = ["(start)", *scenes.COLOURS, *scenes.SHAPES]


def describe(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, and captions [count, LENGTH] as places in WORDS."""
    drawn = scenes.draw_scenes(count, rng)
    colour, shape = drawn.kind // len(scenes.SHAPES), drawn.kind % len(scenes.SHAPES)
    return drawn.image, torch.stack([1 + colour, 1 + len(scenes.COLOURS) + shape], -1).flatten(1)


def heads(x: Tensor) -> Tensor:
    """[B, L, WIDTH] -> [B, HEADS, L, WIDTH / HEADS]"""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Writer(nn.Module):
    def __init__(self, ops) -> None:
        super().__init__()
        self.ops = ops
        self.see, self.word = scenes.ImageTokens(WIDTH), nn.Embedding(len(WORDS), WIDTH)
        self.order = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.itself, self.ask = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.patch = nn.Linear(WIDTH, 2 * WIDTH)
        self.think = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(WORDS))

    def look(self, image) -> tuple[Tensor, ...]:
        """Keys and values of the patches."""
        return tuple(map(heads, self.patch(self.see(image)).chunk(2, -1)))

    def forward(self, seen, words, order, before=None):
        """Logits of the word after each of `words` [B, L], and the keys and values of all words so far.

        `before` has those of the words that came before; without it `words` begin the caption.
        """
        x = self.word(words) + order
        query, *new = map(heads, self.itself(x).chunk(3, -1))
        kept = new if before is None else [torch.cat(pair, 2) for pair in zip(before, new, strict=True)]
        read = self.ops.cross_attention(query, *kept, is_causal=before is None)
        x = x + read.transpose(1, 2).flatten(2)
        x = x + self.ops.cross_attention(heads(self.ask(self.norm(x))), *seen).transpose(1, 2).flatten(2)
        return self.head(x + self.think(x)), kept

    def write(self, image) -> Tensor:
        """[B, LENGTH], greedily."""
        seen, before, words = self.look(image), None, torch.zeros(len(image), 1, dtype=torch.long)
        for place in range(LENGTH):
            logits, before = self(seen, words[:, -1:], self.order[place], before)
            words = torch.cat([words, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return words[:, 1:]

    def loss(self, image, caption):
        given = F.pad(caption[:, :-1], (1, 0))
        return F.cross_entropy(self(self.look(image), given, self.order)[0].flatten(0, 1), caption.flatten())


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    rng = torch.Generator().manual_seed(0)
    model = example.train("captions", Writer, lambda step: describe(BATCH, rng), example.steps(700, quick=300))
    image, caption = describe(500, rng)
    with torch.inference_mode():
        written = model.write(image)
        given = model(model.look(image), F.pad(written[:, :-1], (1, 0)), model.order)[0].argmax(-1)
    right = written == caption
    scores = {"colours": right[:, ::2], "shapes": right[:, 1::2], "whole captions": right.all(1)}
    rows = [[name, hits.float().mean().item()] for name, hits in scores.items()]
    example.table(["greedily written", "right"], rows)
    agree = (given == written).float().mean().item()
    example.check(f"step by step the same words as all at once ({agree:.4f} of them)", agree > 0.999)
    example.check("colours are right in more than 80 % (chance: 25 %)", rows[0][1] > 0.8)
    example.check("shapes are right in more than 50 % (chance: 33 %)", rows[1][1] > 0.5)

    def write_one(ops) -> Tensor:
        model.ops = ops
        return model.write(image[:1]).float()

    with torch.inference_mode():
        example.time("one caption of eight words", write_one)
    with example.picture(1, 4, size=(8, 2.6)) as axes:
        for axis, row in zip(axes, range(4), strict=True):
            said = [WORDS[w] for w in written[row]]
            axis.imshow(image[row].permute(1, 2, 0).tolist())
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(
                "\n".join(f"{said[i]} {said[i + 1]}, {said[i + 2]} {said[i + 3]}" for i in (0, 4)), fontsize="small"
            )
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
