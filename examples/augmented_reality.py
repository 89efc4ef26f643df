"""Which of the things I see is talking, and where am I? Stereo sound and an image, while the wearer waits.

Glasses see a strip with three written digits, two of them the same, and one of the three says its name. The word says
which digit it may be, the difference in loudness between the ears says roughly where; only both together say which.
Each piece of the image reads the sound by `cross_attention` and scores itself: a heat map over the image, as in Objects
that Sound (Arandjelović & Zisserman, 2018) and Learning to Localize Sound Source in Visual Scenes (Senocak et al.,
2018). The surroundings are named as well: a room is bright, a street rumbles, a park is neither, so eyes alone or ears
alone must guess. The same model is trained on mono sound and without seeing. What an answer costs at batch 1 is timed.

    python examples/augmented_reality.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from common.speech import BANDS, SPEAKERS, log_mel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

LENGTH, STRIP, WIDTH, HEADS = 48, 6, 32, 4  # pixels across, of a piece of the image
PLACES = (LENGTH - STRIP) // 2 + 1  # pieces start at every second pixel
SCENES = ["room", "street", "park"]


def walk(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [count, 8, LENGTH], stereo log-mel [count, FRAMES, 2, BANDS], centres of what talks, and SCENES."""
    digits, words = load_digits(), data.spoken()[0]
    drawn, label = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)
    scene = torch.randint(3, (count,))
    image = torch.where(scene == 0, 0.5, 0.0)[:, None, None] + 0.1 * torch.randn(count, 8, LENGTH)
    kind = torch.rand(count, 10).argsort(1)[:, :2][:, [0, 0, 1]].gather(1, torch.rand(count, 3).argsort(1))
    left = torch.arange(3) * LENGTH // 3 + torch.randint(LENGTH // 3 - 8, (count, 3))
    for row in range(count):
        for digit, x in zip(kind[row].tolist(), left[row].tolist(), strict=True):
            these = (label == digit).nonzero()[:, 0]
            image[row, :, x : x + 8] += drawn[these[torch.randint(len(these), ())]]
    talks, row = torch.randint(3, (count,)), torch.arange(count)
    speakers = torch.randint(SPEAKERS, (count,)).tolist()
    said = zip(kind[row, talks].tolist(), speakers, strict=True)
    waves = pad_sequence([words[digit][speaker] for digit, speaker in said], batch_first=True)[:, None]
    centre = left[row, talks] + 4.0
    angle = (centre / LENGTH + 0.18 * torch.randn(count)).clamp(0, 1) * torch.pi / 2
    ears = torch.stack([angle.cos(), angle.sin()], 1)[..., None] * waves
    rumble = F.avg_pool1d(torch.randn(ears.shape), 31, 1, 15) * torch.where(scene == 1, 4.0, 0.0)[:, None, None]
    heard = log_mel((ears + rumble + 0.1 * torch.randn(ears.shape)).flatten(0, 1))[:, : data.FRAMES] / 5
    return image, heard.unflatten(0, (count, 2)).transpose(1, 2), centre, scene


class Glasses(nn.Module):
    def __init__(self, ops, kind: str) -> None:
        super().__init__()
        self.ops, self.kind = ops, kind
        self.see, self.hear = nn.Linear(8 * STRIP, WIDTH), nn.Linear(2 * BANDS, WIDTH)
        self.where, self.when = (nn.Parameter(0.3 * torch.randn(n, WIDTH)) for n in (PLACES, data.FRAMES))
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.join = nn.Linear(3 * WIDTH, WIDTH)
        self.score, self.scene = nn.Linear(WIDTH, 1), nn.Linear(2 * WIDTH, len(SCENES))

    def forward(self, image, sound):
        """A score of each piece of the image [B, PLACES], and logits of the surroundings [B, 3]."""
        if self.kind == "mono":
            sound = sound.mean(2, keepdim=True).expand_as(sound)
        if self.kind == "not seeing":
            image = torch.zeros_like(image)
        pieces = image.unfold(2, STRIP, 2).transpose(1, 2).flatten(2)
        seen = (self.see(pieces) + self.where).relu()
        heard = (self.hear(sound.flatten(2)) + self.when[: sound.shape[1]]).relu()
        query = self.query(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.key_value(heard).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        read = self.ops.cross_attention(query, key, value).transpose(1, 2).flatten(2)
        whole = heard.mean(1, keepdim=True)
        xs = [seen, read, whole.expand_as(seen)]
        joined = self.ops.concat_linear(xs, self.join.weight, self.join.bias, activation="relu")
        return self.score(joined)[..., 0], self.scene(torch.cat([seen.mean(1), whole[:, 0]], -1))

    def loss(self, image, sound, centre, scene):
        score, scenes = self(image, sound)
        near = F.softmax(-((positions() - centre[:, None]) ** 2) / 8, -1)
        return F.cross_entropy(score, near) + 0.3 * F.cross_entropy(scenes, scene)


def positions() -> Tensor:
    """[PLACES]: the centre of each piece, in pixels."""
    return torch.arange(PLACES) * 2.0 + STRIP / 2


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=3)
    train, test = walk(1500 if example.quick else 3000), walk(1000)

    def batch(step: int):
        rows = torch.randint(len(train[0]), (64,))
        return [x[rows] for x in train]

    rows, models = [], {}
    for kind in ["stereo and image", "mono", "not seeing"]:
        models[kind] = example.train(kind, partial(Glasses, kind=kind), batch, example.steps(500, quick=250))
        with torch.no_grad():
            score, scenes = models[kind](*test[:2])
        off = (positions()[score.argmax(1)] - test[2]).abs()
        rows.append([kind, off.mean().item(), (off <= 2).float().mean().item(), accuracy(scenes, test[3])])
    example.table(["senses", "pixels off", "within 2 pixels", "the right surroundings"], rows)
    both, mono, blind = rows
    example.check("one ear is not enough to find it", both[2] > mono[2] + 0.1)
    example.check("nor are ears without eyes", both[2] > blind[2] + 0.1)
    example.check("surroundings need eyes and ears", both[3] > blind[3] + 0.1)
    model = models["stereo and image"]

    def answer(ops) -> Tensor:
        model.ops = ops
        return model(test[0][:1], test[1][:1])[0]

    with torch.inference_mode():
        example.time("one answer", answer, repeats=200)
    with example.picture(3, 2, size=(8, 3.6)) as axes, torch.no_grad():
        score = model(*test[:2])[0].softmax(1)
        for axis, row in zip(axes.flat, range(6), strict=True):
            axis.imshow(test[0][row].tolist(), cmap="gray", vmin=-0.2, vmax=1.5, extent=(0, LENGTH, 8, 0))
            height = 8 - 8 * score[row] / score[row].max()
            axis.plot(positions().tolist(), height.tolist(), "C3", lw=2, label="how likely it talks, says the model")
            axis.plot(test[2][row].item(), 0, "C0v", ms=9, clip_on=False, label="who talks")
            axis.set(xticks=[], yticks=[], title=SCENES[test[3][row]])
        axes[0, 0].figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
