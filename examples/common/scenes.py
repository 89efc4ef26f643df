"""Rendered scenes: a shape of a colour in each quarter, what is where, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from common import words

SIZE, QUARTER = 32, 16
COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.3), "blue": (0.25, 0.35, 0.95), "yellow": (0.95, 0.85, 0.2)}
SHAPES = ["circle", "square", "triangle"]
PHRASES = [(colour, shape) for colour in COLOURS for shape in SHAPES]


@dataclass
class Scenes:
    image: Tensor  # (N, 3, SIZE, SIZE) in 0..1, dark and grainy where nothing is
    kind: Tensor  # (N, 4) int64: which of PHRASES stands in each quarter; no two the same
    box: Tensor  # (N, 4, 4): left, top, right, bottom of each in pixels
    mask: Tensor  # (N, 4, SIZE, SIZE) bool


def draw_scenes(count: int, generator: torch.Generator, noise: float = 0.05) -> Scenes:
    kind = torch.rand(count, len(PHRASES), generator=generator).argsort(1)[:, :4]
    radius = 4 + 2.5 * torch.rand(count, 4, generator=generator)
    corner = QUARTER * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    centre = (
        corner + radius[..., None] + (QUARTER - 2 * radius[..., None]) * torch.rand(count, 4, 2, generator=generator)
    )
    pixel = torch.arange(SIZE) + 0.5
    x = pixel[None, None, None, :] - centre[..., 0, None, None]
    y = pixel[None, None, :, None] - centre[..., 1, None, None]
    r = radius[..., None, None]
    circle = x**2 + y**2 <= r**2
    square = (x.abs() <= r) & (y.abs() <= r)
    triangle = (y <= r) & (x.abs() <= (y + r) / 2)
    shape = (kind % len(SHAPES))[..., None, None]
    mask = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    colour = torch.tensor(list(COLOURS.values()))[kind // len(SHAPES)]  # (N, 4, 3)
    image = 0.15 + torch.einsum("nqhw,nqc->nchw", mask.float(), colour)
    image = image + noise * torch.randn(image.shape, generator=generator)
    box = torch.cat([centre - radius[..., None], centre + radius[..., None]], -1)
    return Scenes(image.clamp(0, 1), kind, box, mask)


@cache
def phrase_words() -> Tensor:
    """(len(PHRASES), 2, words.WIDTH): the two words of each."""
    known = words.dictionary([*COLOURS, *SHAPES])
    return torch.stack([torch.stack([known[word] for word in phrase]) for phrase in PHRASES])


class ImageTokens(torch.nn.Module):
    """(N, 3, SIZE, SIZE) -> (N, 64, width): a token for each 4 x 4 pixels, that knows its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 4, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 4, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(width, width, 3, padding=1),
        )
        self.place = torch.nn.Parameter(0.1 * torch.randn((SIZE // 4) ** 2, width))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image).flatten(2).mT + self.place
