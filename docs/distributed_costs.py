"""Traffic and memory of a training step of several processes, on paper: the tables of distributed.md.

    python docs/distributed_costs.py           # prints them
    python docs/distributed_costs.py --update  # writes them into distributed.md

Traffic is what one rank sends, by collectives that go around rings, as NCCL's do for large messages. All in bytes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).with_name("distributed.md")
BEGIN, END = "<!-- distributed_costs.py: begin -->\n", "<!-- distributed_costs.py: end -->\n"
GPUS = (8, 64, 1000)
FLOAT32, BFLOAT16 = 4, 2


def gathered(size: float, ranks: int) -> float:
    """all_gather of tensors that have so many bytes on all ranks together."""
    return size * (ranks - 1) / ranks


def scattered(size: float, ranks: int) -> float:
    """reduce_scatter of a tensor of so many bytes."""
    return size * (ranks - 1) / ranks


def reduced(size: float, ranks: int) -> float:
    """all_reduce of a tensor of so many bytes: a reduce_scatter and an all_gather."""
    return scattered(size, ranks) + gathered(size, ranks)


def fully_sharded(parameters: float, ranks: int, width: int = BFLOAT16) -> float:
    """`fully_shard`: weights are gathered in the forward and in the backward, float32 gradients are scattered."""
    return 2 * gathered(parameters * width, ranks) + scattered(parameters * FLOAT32, ranks)


def replicated(parameters: float, ranks: int) -> float:
    """DistributedDataParallel: float32 gradients are averaged."""
    return reduced(parameters * FLOAT32, ranks)


def contrastive(rows: float, features: int, ranks: int, width: int = BFLOAT16) -> float:
    """`contrastive_loss` of a batch of so many rows: both sides are gathered, the float32 sums of their gradients are
    reduced, and so are the loss and the gradient of logit_scale."""
    side = rows * features
    return 2 * (gathered(side * width, ranks) + reduced(side * FLOAT32, ranks)) + 2 * reduced(FLOAT32, ranks)


def sigmoid_ring(rows: float, features: int, ranks: int, width: int = BFLOAT16) -> float:
    """`sigmoid_contrastive_loss` around the ring: rows of y, and one step behind them the sums of their gradients; then
    the loss and the gradients of logit_scale and logit_bias are reduced."""
    part = rows * features / ranks
    return (ranks - 1) * part * width + ranks * part * FLOAT32 + 3 * reduced(FLOAT32, ranks)


def context_ring(elements: float, ranks: int, width: int = BFLOAT16, forwards: int = 1) -> float:
    """`context_parallel_attention` around the ring, forward and backward; ``elements``: keys and values of all ranks.

    ``forwards``: 2 where activation checkpointing has it computed twice.
    """
    part = elements / ranks
    return (forwards + 1) * (ranks - 1) * part * width + ranks * part * FLOAT32


def context_gather(elements: float, ranks: int, width: int = BFLOAT16, forwards: int = 1) -> float:
    """`context_parallel_attention` with all parts gathered."""
    return (forwards + 1) * gathered(elements * width, ranks) + scattered(elements * FLOAT32, ranks)


def row_parallel(elements: float, ranks: int, width: int = BFLOAT16) -> float:
    """`concat_linear` with its sources sharded over their features, an output of so many elements, made whole."""
    return reduced(elements * width, ranks)


def states(parameters: float, ranks: int) -> float:
    """Memory of `fully_shard`: float32 weights, their gradients and Adam's two moments."""
    return 4 * FLOAT32 * parameters / ranks


def checkpointed(elements: float, width: int = BFLOAT16) -> float:
    """Memory of what activation checkpointing keeps: the inputs of the blocks."""
    return elements * width


def contrastive_memory(rows: float, features: int, width: int = BFLOAT16) -> float:
    """Memory of the whole batch's rows of both sides."""
    return 2 * rows * features * width


def context_memory(elements: float, outputs: float, ranks: int, width: int = BFLOAT16) -> float:
    """Memory of a ring's forward: three parts, of which one is computed with and one is on its way, and the outputs'
    float32 sums; ``elements`` and ``outputs`` of all ranks."""
    return (3 * elements * width + outputs * FLOAT32) / ranks


@dataclass(frozen=True)
class Step:
    """What a step costs one GPU, in bytes."""

    batch: str
    traffic: dict[str, float]
    memory: dict[str, float]


@dataclass(frozen=True)
class Clip:
    """CLIP ViT-L/14 (Radford et al., 2021, arXiv:2103.00020), 224 × 224, its batch of 32,768."""

    name = "CLIP ViT-L/14"
    parameters = 428e6
    batch = 32768
    features = 768
    # Blocks · tokens · features of the two encoders.
    kept = 24 * 257 * 1024 + 12 * 77 * 768

    def step(self, ranks: int) -> Step:
        return Step(
            f"{self.batch:,} pairs",
            {
                "weights": fully_sharded(self.parameters, ranks),
                "contrastive_loss": contrastive(self.batch, self.features, ranks),
            },
            {
                "states": states(self.parameters, ranks),
                "activations": checkpointed(self.batch / ranks * self.kept),
                "contrastive_loss": contrastive_memory(self.batch, self.features),
            },
        )


@dataclass(frozen=True)
class GroundingDino:
    """Grounding DINO, Swin-T (Liu et al., 2023, arXiv:2303.05499), images of 800 × 1333, 256 words: a batch of 64, or
    an image on each GPU; images are all that is spread."""

    name = "Grounding DINO, Swin-T"
    parameters = 172e6
    levels = (100 * 167, 50 * 84, 25 * 42, 13 * 21)
    # Swin-T's stages, BERT, the encoder's image and text tokens, the decoder's queries.
    kept = (
        (200 * 334 * 96 * 2 + 100 * 167 * 192 * 2 + 50 * 84 * 384 * 6 + 25 * 42 * 768 * 2)
        + 12 * 256 * 768
        + 6 * (sum(levels) + 256) * 256
        + 6 * 900 * 256
    )

    def step(self, ranks: int) -> Step:
        images = max(64, ranks)
        return Step(
            f"{images:,} images",
            {"weights": fully_sharded(self.parameters, ranks)},
            {
                "states": states(self.parameters, ranks),
                "activations": checkpointed(images / ranks * self.kept),
            },
        )


@dataclass(frozen=True)
class StableDiffusion3:
    """Stable Diffusion 3, 8 billion parameters (Esser et al., 2024, arXiv:2403.03206): 38 blocks of 38 heads of 64,
    4096 tokens of a 1024 × 1024 image and 154 of text, spread over groups of 8 GPUs that have 8 images each."""

    name = "Stable Diffusion 3, 8B"
    parameters = 8e9
    blocks, width, tokens = 38, 38 * 64, 4096 + 154
    group = 8

    def step(self, ranks: int) -> Step:
        images = self.group  # of a group
        stream = images * self.tokens * self.width
        around = context_ring(2 * stream, self.group, forwards=2)
        return Step(
            f"{ranks:,} images",
            {
                "weights": fully_sharded(self.parameters, ranks),
                "joint attention's ring": self.blocks * around,
            },
            {
                "states": states(self.parameters, ranks),
                "activations": checkpointed(self.blocks * stream / self.group),
                "joint attention's ring": context_memory(2 * stream, stream, self.group),
            },
        )


MODELS = (Clip(), GroundingDino(), StableDiffusion3())


def _amount(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _sum(parts: dict[str, float]) -> str:
    named = ", ".join(f"{name} {_amount(size)}" for name, size in parts.items())
    return f"**{_amount(sum(parts.values()))}**: {named}" if len(parts) > 1 else named


def table() -> str:
    lines = ["| | GPUs | batch | one GPU sends | one GPU holds |", "|---|---|---|---|---|"]
    for model in MODELS:
        for i, ranks in enumerate(GPUS):
            step = model.step(ranks)
            name = "" if i else model.name
            lines.append(f"| {name} | {ranks:,} | {step.batch} | {_sum(step.traffic)} | {_sum(step.memory)} |")
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """The page with the table as it now is."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true")
    if parser.parse_args().update:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
