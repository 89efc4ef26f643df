"""A sentence looks at two photographs: cross-attention from words to image patches, in torch and in mmkernels.

The photographs are the two that scikit-learn ships. The weights are random with a fixed seed, so the maps show what an
untrained model attends to; the point is that a drop-in module gives the same result, and how long each takes.

    python examples/photo_text.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from mmkernels.nn import MultiheadCrossAttention

SENTENCE = "chinese temple under blue sky beside the flower with bright petals"
WIDTH, HEADS, PATCH, SHARPNESS = 512, 8, 16, 6.0
SHADES = " .:-=+*#%@"


def patches(photo: Tensor) -> Tensor:
    """(H, W, 3) bytes -> (rows * columns, 3 * PATCH * PATCH), standardised."""
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    pixels = photo[: rows * PATCH, : columns * PATCH].float()
    cut = pixels.view(rows, PATCH, columns, PATCH, 3).transpose(1, 2).reshape(rows * columns, -1)
    return (cut - cut.mean(0)) / cut.std()


def embed_words(words: list[str]) -> Tensor:
    """One vector per word, the sum of its letter pairs' vectors: (1, words, WIDTH)."""
    table = torch.randn(27 * 27, WIDTH)
    letters = [[0, *(ord(c) - ord("a") + 1 for c in word), 0] for word in words]
    pairs = [[a * 27 + b for a, b in pairwise(word)] for word in letters]
    return torch.stack([table[p].sum(0) / len(p) ** 0.5 for p in pairs]).unsqueeze(0)


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of a call."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def shaded(values: Tensor) -> list[list[str]]:
    """(26, 40) numbers as 13 lines of 40 characters, which are about twice as tall as wide."""
    small = nn.functional.adaptive_max_pool2d(values[None], (values.shape[0] // 2, values.shape[1]))[0]
    shade = (small - small.min()) / (small.max() - small.min()) * (len(SHADES) - 1)
    return [[SHADES[s] for s in line] for line in shade.round().int().tolist()]


def show(photo: Tensor, attention: Tensor, words: list[str], chosen: str) -> None:
    """Print the photograph, a letter where each word looks most, beside the whole attention of one word."""
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    picture = shaded(nn.functional.adaptive_avg_pool2d(photo.float().mean(-1)[None], (rows, columns))[0])
    strongest, where = attention.max(-1)
    legend = []
    for i, word in enumerate(words):
        row, column = divmod(int(where[i]), columns)
        picture[row // 2][column] = chr(ord("A") + i)
        legend.append(f"{chr(ord('A') + i)} {word} {strongest[i]:.0%}")
    # The square root lets the weaker weights show.
    heat = shaded(attention[words.index(chosen)].view(rows, columns).sqrt())
    print("  " + "where each word looks most".ljust(columns) + f"    all that '{chosen}' looks at")
    for left, right in zip(picture, heat, strict=True):
        print("  " + "".join(left) + "    " + "".join(right))
    print("  " + "\n  ".join(", ".join(legend[i : i + 7]) for i in range(0, len(legend), 7)))


@torch.no_grad()
def main() -> int:
    torch.manual_seed(0)
    data = load_sample_images()
    cut = torch.stack([patches(torch.from_numpy(photo.copy())) for photo in data.images])
    image = cut @ torch.randn(3 * PATCH**2, WIDTH) / (3 * PATCH**2) ** 0.5
    words = SENTENCE.split()
    text = embed_words(words).expand(len(cut), -1, -1)

    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    theirs.in_proj_weight[:WIDTH] *= SHARPNESS  # untrained logits are near zero; this makes a word choose
    ours = MultiheadCrossAttention(WIDTH, HEADS, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())

    expected, weights = theirs(text, image, image)
    got, _ = ours(text, image, image, need_weights=False)
    difference = ((got - expected).norm() / expected.norm()).item()
    same = difference < 1e-5

    for photo, name, attention, chosen in zip(data.images, data.filenames, weights, ("temple", "flower"), strict=True):
        print(f"{name.rsplit('/', 1)[-1]}, {image.shape[1]} patches")
        show(torch.from_numpy(photo.copy()), attention, words, chosen)
        print()

    sizes = f"{len(words)} words x {image.shape[1]} patches, {HEADS} heads of {WIDTH // HEADS}"
    print(f"{sizes}, {torch.get_num_threads()} threads, median of 20")
    for name, module in (("nn.MultiheadAttention", theirs), ("MultiheadCrossAttention", ours)):
        module_seconds = seconds(partial(module, text, image, image, need_weights=False))
        print(f"  {name:24s} {module_seconds * 1e3:7.2f} ms")
    print(f"  same output: {'yes' if same else 'NO'}, relative difference {difference:.1e}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
