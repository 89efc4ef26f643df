"""Questions about a picture: what stands where, how many there are, whether there is such a thing.

A rendered scene holds four shapes, and a question of three words asks for the shape or the colour in a corner, for the
number of things of a colour, or whether a certain thing is there. Quarters of the image and words attend to all of each
other in one call of `joint_attention`, which does not build their concatenation (as in ViLT; Kim et al., 2021; here
with weights of their own for each modality, as in Stable Diffusion 3; Esser et al., 2024); the words then name one of
thirteen answers (Antol et al., VQA: Visual Question Answering, 2015). What sees also learns to name what stands in each
quarter, as the detectors that read images for such models do (Anderson et al., Bottom-Up and Top-Down Attention, 2018).
Language alone can guess, which is the old trap of the task (Goyal et al., Making the V in VQA Matter, 2017): beside
each accuracy stands that of the answer most frequent for its kind of question.

    python examples/questions.py
"""

from __future__ import annotations

import sys

import torch
from common import Example, scenes, words
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, BATCH = 32, 4, 2, 64
CORNERS = [["upper", "left"], ["upper", "right"], ["lower", "left"], ["lower", "right"]]
COLOURS = list(scenes.COLOURS)
ANSWERS = [*scenes.SHAPES, *COLOURS, "none", "one", "two", "three", "no", "yes"]
KINDS = ["shape", "colour", "count", "exists"]
WORDS = words.dictionary([*KINDS, "upper", "lower", "left", "right", "all", *COLOURS, *scenes.SHAPES])


def question(kind: list[int], rng: torch.Generator) -> tuple[str, list[str], str]:
    """What it is about, its three words, and the answer, for a scene with these PHRASES in its quarters."""
    phrases = [scenes.PHRASES[k] for k in kind]
    about, pick = KINDS[int(torch.randint(4, (), generator=rng))], int(torch.randint(12, (), generator=rng))
    if about in ("shape", "colour"):
        return about, [about, *CORNERS[pick % 4]], phrases[pick % 4][about == "shape"]
    if about == "count":
        colour = COLOURS[pick % 4]
        return about, [about, "all", colour], ANSWERS[7 + sum(colour in phrase for phrase in phrases)]
    phrase = phrases[pick % 4] if pick < 6 else scenes.PHRASES[int(torch.randint(12, (), generator=rng))]
    return about, [about, *phrase], ANSWERS[11 + (phrase in phrases)]


def ask(count: int, rng: torch.Generator) -> tuple[list[Tensor], list[tuple[str, list[str], str]]]:
    """Images, PHRASES in their quarters [count, 4], words [count, 3, words.WIDTH], answers as places in ANSWERS; and
    the questions in words."""
    drawn = scenes.draw_scenes(count, rng)
    questions = [question(kind, rng) for kind in drawn.kind.tolist()]
    asked = torch.stack([torch.stack([WORDS[word] for word in said]) for _, said, _ in questions])
    answers = torch.tensor([ANSWERS.index(answer) for _, _, answer in questions])
    return [drawn.image, drawn.kind, asked, answers], questions


class Answerer(nn.Module):
    def __init__(self, ops) -> None:
        super().__init__()
        self.ops = ops
        see = [nn.Conv2d(3, WIDTH, 4, 2, 1), nn.Conv2d(WIDTH, WIDTH, 4, 2, 1), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)]
        see = [layer for conv in see for layer in (conv, nn.BatchNorm2d(WIDTH), nn.ReLU())]
        self.see = nn.Sequential(*see, nn.MaxPool2d(4))  # wherever in its quarter a shape shows what it is
        self.norm, self.read = nn.LayerNorm(WIDTH), nn.Linear(words.WIDTH, WIDTH)
        self.place, self.order = (nn.Parameter(0.5 * torch.randn(n, WIDTH)) for n in (4, 3))
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2 * LAYERS))
        self.think = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2 * LAYERS)
        )
        self.head = nn.Sequential(nn.Linear(3 * WIDTH, 64), nn.GELU(), nn.Linear(64, len(ANSWERS)))
        self.name = nn.Linear(WIDTH, len(scenes.PHRASES))

    def look(self, image):
        """[B, 4, WIDTH]: what is in each quarter."""
        return self.norm(self.see(image).flatten(2).mT)

    def forward(self, image, asked):
        return self.answer(self.look(image), asked)

    def answer(self, seen, asked):
        streams = [seen + self.place, self.read(asked) + self.order]
        for layer in range(LAYERS):
            own = slice(2 * layer, 2 * layer + 2)
            split = [
                p(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
                for p, x in zip(self.project[own], streams, strict=True)
            ]
            query, key, value = map(list, zip(*split, strict=True))  # of [B, HEADS, L, WIDTH / HEADS], one a stream
            read = self.ops.joint_attention(query, key, value)
            streams = [x + r.transpose(1, 2).flatten(2) for x, r in zip(streams, read, strict=True)]
            streams = [x + think(x) for x, think in zip(streams, self.think[own], strict=True)]
        return self.head(streams[1].flatten(1))

    def loss(self, image, kind, asked, answer):
        seen = self.look(image)
        named = F.cross_entropy(self.name(seen).flatten(0, 1), kind.flatten())
        return F.cross_entropy(self.answer(seen, asked), answer) + named


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    rng = torch.Generator().manual_seed(0)
    model = example.train("answers", Answerer, lambda step: ask(BATCH, rng)[0], example.steps(450, quick=250), lr=2e-3)
    (image, _, asked, answer), questions = ask(1000, rng)
    with torch.no_grad():
        said = model(image, asked).argmax(1)
    about, rows = [kind for kind, _, _ in questions], []
    for kind in KINDS:
        these = torch.tensor([k == kind for k in about])
        guess = (answer[these] == answer[these].mode().values).float().mean().item()
        rows.append([kind, (said == answer)[these].float().mean().item(), guess, int(these.sum())])
    right, guessed = (sum(row[i] * row[3] for row in rows) / len(answer) for i in (1, 2))
    example.table(["question", "accuracy", "most frequent answer", "asked"], [*rows, ["all", right, guessed, 1000]])
    example.check("seeing beats guessing", right > guessed + 0.1)
    for about_corner, right, guessed, _ in rows[:2]:
        example.check(f"the {about_corner} in a corner is told", right > guessed + 0.3)
    example.check("and so is how many there are", rows[2][1] > rows[2][2] + 0.05)
    with example.picture(1, 4, size=(8, 2.8)) as axes:
        for axis, kind in zip(axes, KINDS, strict=True):
            row = about.index(kind)
            axis.imshow(image[row].permute(1, 2, 0).tolist())
            mark = "correct" if said[row] == answer[row] else f"wrong: {ANSWERS[answer[row]]}"
            axis.set(xticks=[], yticks=[], title=" ".join(questions[row][1]) + "?")
            axis.set_xlabel(f"“{ANSWERS[said[row]]}” ({mark})")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
