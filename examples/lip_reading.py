"""Hearing with the eyes: spoken digits under noise, and the lips that say them.

In a loud room people understand far more when they see the speaker's mouth (Sumby & Pollack, Visual Contribution to
Speech Intelligibility in Noise, 1954), and so do networks (Afouras et al., Deep Audio-Visual Speech Recognition, 2018).
The ten words are synthesised here from their sounds, so the mouth is known as well: it is open as far as the first
formant is high, and wide as far as the second is, and is drawn as small pictures in so much grain that lips alone do
not tell all words. Frames of sound read frames of the mouth by `cross_attention`, both as long as the word is
(`key_lengths`), and `concat_linear` joins the two. One model is trained for each choice of senses, on words in any
noise; the speakers it is asked about are others.

    python examples/lip_reading.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from common.speech import BANDS, HOP, RATE, SOUNDS, SPELLED, WORDS, log_mel, synthesised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

SPEAKERS, HEARD, WIDTH, HEADS, SIZE = 16, 12, 32, 4, 8  # speakers in all and in training, of the model, pixels
LOUDNESS, GRAIN = [0.0, 1.0, 2.0, 4.0, 8.0], 1.8  # of the noise, in units of the voice; on the pictures
SENSES = ["sound and lips", "sound", "lips"]


def mouth(word: str, speed: float, frames: int) -> Tensor:
    """[frames, SIZE, SIZE]: the mouth while it says the word, bright where it is open."""
    ends = torch.tensor([SOUNDS[letter][3] / speed for letter in word]).cumsum(0)
    now = (torch.arange(frames) * HOP / RATE).clamp_max(ends[-1] - 1e-3)
    which = torch.searchsorted(ends, now, right=True).tolist()
    formants = torch.tensor([SOUNDS[word[i]][0] for i in which])
    height, width = formants[:, 0].clamp(200, 800) / 200, formants[:, 1].clamp(300, 2400) / 600
    height = F.avg_pool1d(F.pad(height[None], (1, 1), "replicate"), 3, 1)[0]  # lips are slow
    place = torch.arange(SIZE) - (SIZE - 1) / 2
    inside = (place[:, None] / height[:, None, None]) ** 2 + (place / width[:, None, None]) ** 2
    return (4 * (1 - inside)).sigmoid()


def speakers() -> list[list[tuple[Tensor, Tensor]]]:
    """For each speaker, the sound and the mouth of each word."""
    rng = torch.Generator().manual_seed(0)
    spoken = []
    for _ in range(SPEAKERS):
        pitch, speed, tract = torch.rand(3, generator=rng).tolist()
        voice = 90 + 140 * pitch, 0.8 + 0.5 * speed, 0.9 + 0.25 * tract
        waves = [synthesised(word, *voice, rng) for word in SPELLED]
        spoken.append(
            [
                (wave / wave.square().mean().sqrt(), mouth(word, voice[1], len(wave) // HOP + 1))
                for word, wave in zip(SPELLED, waves, strict=True)
            ]
        )
    return spoken


def say(spoken: list, count: int, loudness: Tensor) -> dict[str, Tensor]:
    """Words by any of the speakers under noise [count]: log-mel, mouth, their length in frames, and which word."""
    label, who = torch.randint(10, (count,)), torch.randint(len(spoken), (count,)).tolist()
    waves, mouths = zip(*[spoken[s][word] for s, word in zip(who, label.tolist(), strict=True)], strict=True)
    length = torch.tensor([len(m) for m in mouths]).clamp_max(data.FRAMES)
    sound = pad_sequence(list(waves), batch_first=True)
    mel = log_mel(sound + loudness[:, None] * torch.randn(sound.shape))[:, : data.FRAMES] / 5
    seen = pad_sequence(list(mouths), batch_first=True)[:, : data.FRAMES].flatten(2)
    mel, seen = (F.pad(x, (0, 0, 0, data.FRAMES - x.shape[1])) for x in (mel, seen))
    return dict(mel=mel, seen=seen + GRAIN * torch.randn(seen.shape), length=length, label=label)


class Listener(nn.Module):
    def __init__(self, ops, senses: str) -> None:
        super().__init__()
        self.ops, self.senses = ops, senses
        self.hear, self.see = nn.Linear(BANDS, WIDTH), nn.Linear(SIZE**2, WIDTH)
        self.time = nn.Parameter(0.3 * torch.randn(data.FRAMES, WIDTH))
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.join, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(data.FRAMES * WIDTH, 10)

    def forward(self, mel, seen, length):
        mel = mel if "sound" in self.senses else torch.zeros_like(mel)
        seen = seen if "lips" in self.senses else torch.zeros_like(seen)
        heard, lips = ((layer(x) + self.time).relu() for layer, x in ((self.hear, mel), (self.see, seen)))
        query = self.query(heard).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.key_value(lips).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        read = lips + self.ops.cross_attention(query, key, value, key_lengths=length).transpose(1, 2).flatten(2)
        joined = self.ops.concat_linear([heard, read], self.join.weight, self.join.bias, activation="relu")
        there = torch.arange(data.FRAMES) < length[:, None]
        return self.head((joined * there[..., None]).flatten(1))

    def loss(self, mel, seen, length, label):
        return F.cross_entropy(self(mel, seen, length), label)


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=len(SENSES))
    spoken = speakers()
    train = say(spoken[:HEARD], 3000, LOUDNESS[-1] * torch.rand(3000) ** 2)
    tests = [say(spoken[HEARD:], 500, torch.full((500,), loudness)) for loudness in LOUDNESS]

    def batch(step: int):
        rows = torch.randint(len(train["label"]), (64,))
        return [x[rows] for x in train.values()]

    scores = {}
    for senses in SENSES:
        model = example.train(senses, partial(Listener, senses=senses), batch, example.steps(400, quick=200))
        with torch.no_grad():
            scores[senses] = [accuracy(model(*list(t.values())[:3]), t["label"]) for t in tests]
    example.table(["accuracy in noise", *map(str, LOUDNESS)], [[name, *score] for name, score in scores.items()])
    both, sound, lips = ([*score] for score in scores.values())
    example.check("in the loudest noise lips help by more than 10 points", both[-1] > sound[-1] + 0.1)
    moderate = [score[1] + score[2] for score in (both, sound, lips)]
    example.check("in moderate noise both are better than either", moderate[0] > max(moderate[1:]) + 0.02)
    with example.picture(1, 2, size=(8, 3)) as axes:
        for name, score in scores.items():
            axes[0].plot(range(len(LOUDNESS)), score, marker="o", label=name)
        axes[0].set_xticks(range(len(LOUDNESS)), [f"{loudness:g}" for loudness in LOUDNESS])
        axes[0].set(xlabel="noise, in units of the voice", ylabel="accuracy", ylim=(0, 1.05))
        axes[0].legend()
        rows = [torch.cat(list(spoken[0][word][1][:4]), 1) for word in (1, 5, 6)]
        axes[1].imshow(torch.cat(rows).tolist(), cmap="magma")
        axes[1].set_yticks([3.5, 11.5, 19.5], [f"“{WORDS[word]}”" for word in (1, 5, 6)])
        axes[1].set(title="the mouth, as time goes on", xticks=[])
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
