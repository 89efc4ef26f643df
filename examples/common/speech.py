"""Spoken digits: by espeak-ng where it is installed, else by a formant synthesiser; and their log-mel features."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RATE, BANDS, HOP, WINDOW = 8000, 24, 320, 400  # 40 ms steps, 50 ms windows
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPEAKERS = 24

# A sound: its first three formants in Hz, how much of it is voice and how much is noise, and its length in seconds.
SOUNDS = {
    "a": ((730, 1090, 2440), 1, 0, 0.11),
    "e": ((530, 1840, 2480), 1, 0, 0.10),
    "i": ((270, 2290, 3010), 1, 0, 0.10),
    "o": ((570, 840, 2410), 1, 0, 0.13),
    "u": ((300, 870, 2240), 1, 0, 0.13),
    "w": ((300, 610, 2200), 0.6, 0, 0.06),
    "r": ((310, 1060, 1380), 0.7, 0, 0.07),
    "n": ((280, 1700, 2600), 0.4, 0, 0.08),
    "k": ((300, 1800, 2400), 0, 0.3, 0.05),
    "t": ((400, 2600, 3500), 0, 0.5, 0.04),
    "f": ((1000, 2200, 3300), 0, 0.3, 0.09),
    "v": ((250, 1100, 2300), 0.3, 0.2, 0.06),
    "s": ((1600, 3300, 3800), 0, 0.6, 0.11),
    "z": ((250, 3200, 3800), 0.3, 0.5, 0.09),
    "T": ((1400, 2100, 2700), 0, 0.2, 0.09),
}
SPELLED = ["ziro", "wan", "tu", "Tri", "for", "faiv", "siks", "sevan", "eit", "nain"]  # T is the th of "three"


def synthesised(word: str, pitch: float, speed: float, tract: float, generator: torch.Generator) -> Tensor:
    """Harmonics of the voice and a hiss, both as loud as the three resonances of the mouth let them be."""
    sounds = [SOUNDS[letter] for letter in word]
    ends = torch.tensor([sound[3] / speed for sound in sounds]).cumsum(0)
    time = torch.arange(int(ends[-1] * RATE)) / RATE
    centres = (ends + torch.cat([torch.zeros(1), ends[:-1]])) / 2
    targets = torch.tensor([(*sound[0], sound[1], sound[2]) for sound in sounds])
    track = torch.from_numpy(np.stack([np.interp(time, centres, target) for target in targets.T])).float()
    formants, voiced, hiss = track[:3] * tract, track[3], track[4]

    def loudness(hertz: Tensor) -> Tensor:
        return sum(1 / (1 + ((hertz - f) / 90) ** 2) for f in formants)  # a resonance 90 Hz wide

    harmonics = torch.arange(1, int(RATE / 2 / pitch))[:, None] * pitch * (1 + 0.02 * torch.sin(6 * time))
    voice = (torch.sin(2 * math.pi * harmonics.cumsum(1) / RATE) * loudness(harmonics)).sum(0)
    tones = torch.rand(150, 1, generator=generator) * RATE / 2
    phases = torch.rand(150, 1, generator=generator) * 2 * math.pi
    noise = (torch.sin(2 * math.pi * tones * time + phases) * loudness(tones)).sum(0)
    return voiced * voice + hiss * noise


def by_espeak(word: str, speaker: int) -> Tensor:
    """One of 8 variants of the English voice at one of three speeds."""
    variant = ["m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4"][speaker % 8]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "word.wav"
        command = ["espeak-ng", "-v", f"en+{variant}", "-s", str((130, 165, 200)[speaker // 8]), "-w", str(path), word]
        subprocess.run(command, check=True)
        with wave.open(str(path)) as file:
            rate, samples = file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), np.int16)
    sound = torch.from_numpy(samples.astype(np.float32))
    loud = (sound.abs() > 0.02 * sound.abs().max()).nonzero()[:, 0]
    sound = sound[loud[0] : loud[-1] + 1]  # without the silence around the word
    return torch.nn.functional.interpolate(sound[None, None], scale_factor=RATE / rate, mode="linear")[0, 0]


def speaker() -> str:
    """What speaks on this machine."""
    if os.environ.get("MMKERNELS_ESPEAK") == "0":
        return "the formant synthesiser"
    return "espeak-ng" if shutil.which("espeak-ng") else "the formant synthesiser (espeak-ng is not installed)"


def utterances() -> list[list[Tensor]]:
    """Each of the ten words by each speaker, of unit loudness."""
    generator = torch.Generator().manual_seed(0)
    spoken = []
    for spelled, word in zip(SPELLED, WORDS, strict=True):
        spoken.append([])
        for who in range(SPEAKERS):
            if speaker() == "espeak-ng":
                sound = by_espeak(word, who)
            else:
                pitch, speed, tract = torch.rand(3, generator=generator).tolist()
                sound = synthesised(spelled, 90 + 140 * pitch, 0.8 + 0.5 * speed, 0.9 + 0.25 * tract, generator)
            spoken[-1].append(sound / sound.square().mean().sqrt())
    return spoken


def mel_filters() -> Tensor:
    """(WINDOW // 2 + 1, BANDS) triangles, evenly spaced on the mel scale (HTK's formula)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(sound: Tensor) -> Tensor:
    """(…, samples) -> (…, frames, BANDS)."""
    spectrum = torch.stft(sound, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    return (spectrum.mT @ mel_filters() + 1e-2).log()
