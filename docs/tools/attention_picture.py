"""The picture of attention_weights.md: `python docs/tools/attention_picture.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

import mmkernels as mmk

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # once the backend is chosen

PICTURE = Path(__file__).parents[1] / "pictures" / "attention_weights.png"
PATCH, SHARPNESS = 16, 4.0
CHOSEN = {"petals": (13, 12), "middle": (14, 20), "leaves": (3, 35)}  # (row, column) of a patch


def patches(photo: Tensor) -> Tensor:
    """The mean colour of each patch, (rows, columns, 3), standardised."""
    rows, columns = photo.shape[0] // PATCH, photo.shape[1] // PATCH
    cut = photo[: rows * PATCH, : columns * PATCH].float().view(rows, PATCH, columns, PATCH, 3)
    colours = cut.mean((1, 3))
    return (colours - colours.mean((0, 1))) / colours.std((0, 1))


def weights_of(queries: Tensor, keys: Tensor, chosen: list[int]) -> Tensor:
    """The weights of the chosen queries over all keys, (chosen, keys); queries and keys are (tokens, features)."""
    q, k = queries[None, None], keys[None, None]
    _, lse = mmk.cross_attention(q, k, k, scale=SHARPNESS, return_lse=True)
    return torch.exp(SHARPNESS * q[0, 0, chosen] @ k[0, 0].T - lse[0, 0, chosen].unsqueeze(-1))


def main() -> None:
    photo = torch.tensor(load_sample_image("flower.jpg"))
    colours = patches(photo)
    rows, columns, _ = colours.shape
    tokens = torch.nn.functional.normalize(colours.view(-1, 3), dim=-1)
    weights = weights_of(tokens, tokens, [row * columns + column for row, column in CHOSEN.values()])
    figure, axes = plt.subplots(1, 4, figsize=(10, 2), layout="constrained")
    axes[0].imshow(photo)
    axes[0].set_title("photograph", fontsize=9)
    for axis, (name, (row, column)), of_patch in zip(axes[1:], CHOSEN.items(), weights, strict=True):
        axis.imshow(of_patch.view(rows, columns), cmap="magma")
        axis.plot(column, row, "o", color="cyan", markersize=4)
        axis.set_title(f"read by a patch of the {name}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=90)
    print(f"Written: {PICTURE}")


if __name__ == "__main__":
    main()
