"""Find what the words name: boxes, outlines, and whether it is there at all.

A rendered scene holds four shapes of different colours, and a phrase such as "red circle" names one of them, or none.
Image patches and words attend to each other by one table of scores (GLIP; Li et al., Grounded Language-Image
Pre-training, 2022; Liu et al., Grounding DINO, 2023), here twice by `bidirectional_cross_attention`. Each patch then
says three things: whether it belongs to what is named, which of its pixels do (segmentation), and how far the sides of
the box are (Tian et al., FCOS, 2019). A box is as good as its intersection with the true one over their union (IoU).
Without the words the task cannot be done: given a phrase for another object of the scene, the model finds that one. The
same scores classify an image by text: of all phrases, which fits it best (as in CLIP; Radford et al., 2021)?

    python examples/vision.py
"""

from __future__ import annotations

import sys

import torch
from common import Example, scenes, words
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, PATCH = 32, 4, 2, 4
ABSENT = 0.25  # share of phrases that name nothing in the scene


class Exchange(nn.Module):
    """Two sequences attend to each other, then each token thinks for itself."""

    def __init__(self, ops) -> None:
        super().__init__()
        self.ops = ops
        self.project = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.think = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, streams):
        split = [
            p(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
            for p, x in zip(self.project, streams, strict=True)
        ]
        (query, x_value), (key, y_value) = split  # [B, HEADS, L, WIDTH / HEADS] each
        read = self.ops.bidirectional_cross_attention(query, key, x_value, y_value)
        joined = [x + r.transpose(1, 2).flatten(2) for x, r in zip(streams, read, strict=True)]
        return [x + think(x) for x, think in zip(joined, self.think, strict=True)]


class Grounding(nn.Module):
    def __init__(self, ops) -> None:
        super().__init__()
        self.see, self.read = scenes.ImageTokens(WIDTH), nn.Linear(words.WIDTH, WIDTH)
        self.layers = nn.ModuleList(Exchange(ops) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 1 + 4 + PATCH**2)

    def forward(self, image, phrase):
        """Per patch: the score [B, 64], the box [B, 64, 4] in pixels, and the pixels' logits [B, SIZE, SIZE]."""
        streams = [self.see(image), self.read(phrase)]
        for layer in self.layers:
            streams = layer(streams)
        score, sides, pixels = self.head(streams[0]).split([1, 4, PATCH**2], -1)
        side = torch.arange(PATCH / 2, scenes.SIZE, PATCH)
        centre = torch.cartesian_prod(side, side).flip(1)  # [64, 2] x, y
        sides = PATCH * sides.exp()
        box = torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], -1)
        return score[..., 0], box, F.pixel_shuffle(pixels.mT.unflatten(-1, (8, 8)), PATCH)[:, 0]

    def loss(self, image, phrase, box, mask):
        score, boxes, pixels = self(image, phrase)
        inside = F.max_pool2d(mask[:, None].float(), PATCH).flatten(1)  # [B, 64]: a pixel of the object is in the patch
        overlap = iou(boxes, box[:, None].expand_as(boxes))
        found = F.binary_cross_entropy_with_logits(score, inside, pos_weight=torch.tensor(4.0))
        outlined = F.binary_cross_entropy_with_logits(pixels, mask.float(), pos_weight=torch.tensor(4.0))
        return found + outlined + (inside * (1 - overlap)).sum() / inside.sum()


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4]."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    area = [(box[..., 2:] - box[..., :2]).clamp_min(1e-3).prod(-1) for box in (a, b)]
    return size / (area[0] + area[1] - size)


def ask(count: int, absent: float, generator: torch.Generator) -> tuple[scenes.Scenes, list[Tensor]]:
    """Scenes, and of each: the image, a phrase's words, the named object's box and its pixels, which may be none."""
    drawn = scenes.draw_scenes(count, generator)
    row, quarter = torch.arange(count), torch.randint(4, (count,), generator=generator)
    named, none = drawn.kind[row, quarter], torch.rand(count, generator=generator) < absent
    others = (torch.arange(len(scenes.PHRASES)) != drawn.kind[..., None]).all(1)  # [count, 12], those not in the scene
    named = torch.where(none, torch.multinomial(others.float(), 1, generator=generator)[:, 0], named)
    mask = drawn.mask[row, quarter] & ~none[:, None, None]
    return drawn, [drawn.image, scenes.phrase_words()[named], drawn.box[row, quarter], mask]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    generator = torch.Generator().manual_seed(0)
    steps = example.steps(700, quick=350)
    model = example.train("grounding", Grounding, lambda step: ask(20, ABSENT, generator)[1], steps, lr=5e-3)
    rows, found = [], {}
    with torch.no_grad():
        drawn, (image, phrase, box, mask) = ask(400, 0.0, generator)
        other = scenes.phrase_words()[drawn.kind[torch.arange(400), torch.randint(4, (400,))]]
        for name, said in {"the phrase": phrase, "a phrase for any of the four": other}.items():
            score, boxes, pixels = model(image, said)
            best = boxes[torch.arange(400), score.argmax(1)]
            painted = pixels > 0
            overlap = (painted & mask).sum((1, 2)) / (painted | mask).sum((1, 2)).clamp_min(1)
            found[name] = iou(best, box).mean().item(), overlap.mean().item()
            rows.append([name, *found[name], (iou(best, box) > 0.5).float().mean().item()])
        _, (image, phrase, _, mask) = ask(400, 0.5, generator)
        there = (model(image, phrase)[0].amax(1) > 0) == mask.any(2).any(1)
        phrases = (said.expand(400, -1, -1) for said in scenes.phrase_words())
        fits = torch.stack([model(drawn.image, said)[0].amax(1) for said in phrases], 1)
        named = (drawn.kind == fits.argmax(1, keepdim=True)).any(1).float().mean().item()
    example.table(["given", "IoU of boxes", "IoU of outlines", "boxes with IoU over 0.5"], rows)
    print(f"is the named object in the image? right in {there.float().mean():.3f} of the cases")
    print(f"which of all twelve phrases fits the image best? right in {named:.3f} of the cases (chance: 0.333)\n")
    example.check("boxes and outlines overlap with the true ones by more than half", min(found["the phrase"]) > 0.5)
    example.check("it is the words that say which", rows[1][1] < 0.6 * rows[0][1])
    example.check("the phrase that fits best is one of the image's four", named > 0.5)
    example.check("whether an image holds what the words say is told", there.float().mean().item() > 0.6)
    with example.picture(2, 4, size=(8, 4.3)) as axes, torch.no_grad():
        drawn = scenes.draw_scenes(4, generator)
        for column in range(4):
            said = drawn.kind[column, column]
            image, phrase = drawn.image[column : column + 1], scenes.phrase_words()[said][None]
            score, boxes, pixels = model(image, phrase)
            left, top, right, bottom = boxes[0, score[0].argmax()].tolist()
            for axis, shown in zip(axes[:, column], (image[0].permute(1, 2, 0), pixels[0].sigmoid()), strict=True):
                axis.imshow(shown.tolist(), extent=(0, scenes.SIZE, scenes.SIZE, 0), cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=[], yticks=[])
            axes[0, column].plot([left, right, right, left, left], [top, top, bottom, bottom, top], "w", lw=2)
            axes[0, column].set_title("“{} {}”".format(*scenes.PHRASES[said]))
        axes[0, 0].set_ylabel("its box")
        axes[1, 0].set_ylabel("its pixels")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
