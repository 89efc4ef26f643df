"""One event in four modalities: a written digit, the word spoken, the word typed, and the digit drifting in a video.

Images are scikit-learn's digits. Speech (common/speech.py) and the vectors of typed words (common/words.py) are made
once and kept in the user's cache directory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common import speech, words
from common.cache import kept

FRAMES = 16


@dataclass
class Events:
    image: Tensor  # (N, 64) in 0..1
    audio: Tensor  # (N, FRAMES, BANDS) log-mel, zeros from `frames` on
    frames: Tensor  # (N,) int64
    text: Tensor  # (N, words.WIDTH)
    label: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Tensor | slice) -> Events:
        return Events(*(getattr(self, field.name)[rows] for field in fields(self)))

    def features(self) -> list[Tensor]:
        """One vector a modality: (N, 64), (N, FRAMES * BANDS), (N, words.WIDTH)."""
        return [self.image, self.audio.flatten(1), self.text]


@cache
def spoken() -> tuple[list[list[Tensor]], str]:
    """The ten words by every speaker, and what spoke them; made once."""
    return kept("spoken", inspect.getsource(speech) + speech.speaker(), speech.utterances), speech.speaker()


def misspelt(word: str, errors: int, generator: torch.Generator) -> str:
    for _ in range(errors):
        place = int(torch.randint(len(word), (), generator=generator))
        letter = words.LETTERS[int(torch.randint(26, (), generator=generator))]
        word = word[:place] + letter + word[place + 1 :]
    return word


def draw_events(
    noise: float = 0.0,
    loudness: float = 0.0,
    errors: int = 0,
    seed: int = 0,
    read: Callable[[Sequence[str]], Tensor] = words.embed,
) -> Events:
    """All 1797 digits in scikit-learn's order, each with a speaker and a spelling of its own.

    `noise` is added to the image, `loudness` is that of noise behind the voice, `errors` letters are
    mistyped, and `read` makes vectors of the words.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    label = torch.from_numpy(digits.target).long()
    image = torch.from_numpy(digits.data).float() / 16
    image = image + noise * torch.randn(image.shape, generator=generator)
    said, _ = spoken()
    speakers = torch.randint(speech.SPEAKERS, (len(label),), generator=generator)
    sounds = [said[d][s] for d, s in zip(label.tolist(), speakers.tolist(), strict=True)]
    frames = torch.tensor([len(sound) // speech.HOP + 1 for sound in sounds]).clamp_max(FRAMES)
    waves = pad_sequence(sounds, batch_first=True)
    mel = speech.log_mel(waves + loudness * torch.randn(waves.shape, generator=generator))[:, :FRAMES] / 5
    audio = F.pad(mel, (0, 0, 0, FRAMES - mel.shape[1])) * (torch.arange(FRAMES) < frames[:, None])[..., None]
    text = read([misspelt(speech.WORDS[d], errors, generator) for d in label.tolist()])
    return Events(image, audio, frames, text, label)


def split(events: Events, share: float = 0.7) -> tuple[Events, Events]:
    """Train and test, shuffled by a fixed seed."""
    order = torch.randperm(len(events), generator=torch.Generator().manual_seed(2))
    cut = int(share * len(events))
    return events[order[:cut]], events[order[cut:]]


def batches(
    events: Events,
    view: Callable[[Events], list[Tensor]] = Events.features,
    label: Tensor | None = None,
    size: int = 64,
) -> Callable[[int], tuple[list[Tensor], Tensor]]:
    """What Example.train asks for: inputs and labels of rows drawn at random, whichever step it is."""

    def batch(step: int) -> tuple[list[Tensor], Tensor]:
        rows = torch.randperm(len(events))[:size]
        return view(events[rows]), (events.label if label is None else label)[rows]

    return batch


def video(image: Tensor, steps: int = 6, size: int = 16) -> Tensor:
    """(N, 64) -> (N, steps, size, size): the digit drifts from the upper left to the lower right."""
    frames = torch.zeros(len(image), steps, size, size)
    for step in range(steps):
        place = round(step * (size - 8) / max(steps - 1, 1))
        frames[:, step, place : place + 8, place : place + 8] = image.view(-1, 8, 8)
    return frames
