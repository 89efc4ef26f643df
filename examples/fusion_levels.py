"""Early, late or in between: where should modalities meet?

A digit is seen under noise, heard under noise and typed with errors. Feature fusion joins the encoders' vectors before
one classifier: by concatenation, by low-rank products (Liu et al., Low-rank Multimodal Fusion, 2018), by the whole
tensor product (Zadeh et al., Tensor Fusion Network, 2017) or by gates (Arevalo et al., Gated Multimodal Units, 2017).
Decision fusion lets each modality classify alone and joins the verdicts in one of five ways. Deep fusion lets tokens
attend: each modality to another (cross), all to all (joint; Esser et al., Stable Diffusion 3, 2024), or both ways by
the same scores (bidirectional; Li et al., GLIP, 2022). All see the same data for the same number of steps.

    python examples/fusion_levels.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, accuracy, data
from torch import nn

WIDTH, CLASSES, RANK, HEADS = 16, 10, 4, 2
FEATURES = ["concat_linear", "low_rank", "tensor", "gated"]
DECISIONS, DEEP = ["mean", "log", "product", "max", "vote"], ["cross", "joint", "bidirectional"]


class Encoders(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU()) for size in sizes)

    def forward(self, xs):
        return [encoder(x) for encoder, x in zip(self.encoders, xs, strict=True)]  # M of [B, WIDTH] or [B, L, WIDTH]


class FeatureFusion(nn.Module):
    def __init__(self, ops, kind: str, sizes: list[int]) -> None:
        super().__init__()
        self.ops, self.kind, self.encode, modalities = ops, kind, Encoders(sizes), len(sizes)
        self.head = nn.Linear(WIDTH, CLASSES)
        if kind == "concat_linear":
            self.fuse = nn.Linear(modalities * WIDTH, WIDTH)
        elif kind == "gated":
            self.values = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in sizes)
            self.gate = nn.Linear(modalities * WIDTH, modalities * WIDTH)
        elif kind == "low_rank":
            self.factors = nn.ParameterList(torch.randn(RANK, WIDTH + 1, WIDTH) / WIDTH**0.5 for _ in sizes)
            self.rank_weights = nn.Parameter(torch.ones(RANK) / RANK)
        else:
            self.fuse = nn.Linear((WIDTH + 1) ** modalities, WIDTH)

    def forward(self, xs):
        xs = self.encode(xs)
        if self.kind == "concat_linear":
            y = self.ops.concat_linear(xs, self.fuse.weight, self.fuse.bias, activation="relu")
        elif self.kind == "gated":
            weights, biases = zip(*[(v.weight, v.bias) for v in self.values], strict=True)
            y = self.ops.gated_fusion(xs, list(weights), list(biases), self.gate.weight, self.gate.bias)
        elif self.kind == "low_rank":
            y = self.ops.low_rank_fusion(xs, list(self.factors), self.rank_weights)
        else:
            y = self.ops.tensor_fusion_linear(xs, self.fuse.weight, self.fuse.bias)
        return self.head(y)

    def loss(self, xs, label):
        return nn.functional.cross_entropy(self(xs), label)


class DecisionFusion(nn.Module):
    def __init__(self, ops, sizes: list[int]) -> None:
        super().__init__()
        self.ops, self.encode = ops, Encoders(sizes)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in sizes)

    def forward(self, xs):
        return [head(x) for head, x in zip(self.heads, self.encode(xs), strict=True)]

    def loss(self, xs, label):
        return self.ops.multimodal_cross_entropy(self(xs), label)[0]


class DeepFusion(nn.Module):
    """Tokens are the image's rows, the sound's frames and the one word; attention, then the mean of what came out."""

    def __init__(self, ops, kind: str, sizes: list[int]) -> None:
        super().__init__()
        self.ops, self.kind, self.encode = ops, kind, Encoders(sizes)
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in sizes)
        self.place = nn.ParameterList(torch.randn(length, WIDTH) / 2 for length in (8, data.FRAMES, 1))
        self.head = nn.Linear(len(sizes) * WIDTH, CLASSES)

    def forward(self, tokens):
        tokens = [x + place for x, place in zip(self.encode(tokens), self.place, strict=True)]
        split = [
            p(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4) for p, x in zip(self.project, tokens, strict=True)
        ]
        query, key, value = map(list, zip(*split, strict=True))  # M of [B, HEADS, L, WIDTH / HEADS] each
        if self.kind == "cross":  # the image reads the sound, the sound the word, the word the image
            read = [self.ops.cross_attention(query[i], key[i - 2], value[i - 2]) for i in range(3)]
        elif self.kind == "joint":
            read = self.ops.joint_attention(query, key, value)
        else:
            image, sound = self.ops.bidirectional_cross_attention(query[0], key[1], value[0], value[1])
            read = [image, sound, value[2]]
        read = [x + r.transpose(1, 2).flatten(2) for x, r in zip(tokens, read, strict=True)]
        return self.head(torch.cat([r.relu().mean(1) for r in read], -1))

    def loss(self, tokens, label):
        return nn.functional.cross_entropy(self(tokens), label)


def tokens(events: data.Events) -> list[torch.Tensor]:
    return [events.image.view(-1, 8, 8), events.audio, events.text[:, None]]


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=1 + len(FEATURES) + len(DEEP))
    train, test = data.split(data.draw_events(noise=0.5, loudness=2.0, errors=2))
    sizes, token_sizes = [x.shape[-1] for x in train.features()], [x.shape[-1] for x in tokens(train)]

    rows, steps = [], example.steps(300, quick=80)
    alone = example.train("each alone", partial(DecisionFusion, sizes=sizes), data.batches(train), steps)
    logits = alone(test.features())
    single = [accuracy(z, test.label) for z in logits]
    rows += [["alone", name, score] for name, score in zip(["image", "sound", "text"], single, strict=True)]
    for method in DECISIONS:
        rows.append(["decision", method, accuracy(alone.ops.decision_fusion(logits, method=method), test.label)])
    for kind in FEATURES:
        model = example.train(kind, partial(FeatureFusion, kind=kind, sizes=sizes), data.batches(train), steps)
        rows.append(["feature", kind, accuracy(model(test.features()), test.label)])
    for kind in DEEP:
        make = partial(DeepFusion, kind=kind, sizes=token_sizes)
        model = example.train(kind, make, data.batches(train, tokens), steps)
        rows.append(["deep", kind, accuracy(model(tokens(test)), test.label)])
    example.table(["level", "fusion", "accuracy"], rows)
    by_name = dict(row[1:] for row in rows)
    example.check("joined probabilities beat the best modality alone", by_name["mean"] > max(single))
    example.check("the best feature fusion does too", max(by_name[kind] for kind in FEATURES) > max(single))
    with example.picture() as axes:
        colours = {"alone": "0.6", "decision": "C0", "feature": "C1", "deep": "C2"}
        for level, colour in colours.items():
            axes.bar(*zip(*(row[1:] for row in rows if row[0] == level), strict=True), color=colour, label=level)
        axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        axes.tick_params(axis="x", rotation=60)
        axes.set(ylabel="accuracy on unseen digits")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
