"""Fusion stacks of published models at their shapes, one for each field of application, projections included.

Each is written once, with the ops handed in: this library's, or the same in plain torch.
``python -m mmkernels bench --workload LXMERT`` picks one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import linear_weight


class Plain:
    """The ops as models write them."""

    @staticmethod
    def cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def joint_attention(
        queries: Sequence[Tensor], keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        query, key, value = (torch.cat(list(xs), 2) for xs in (queries, keys, values))
        return F.scaled_dot_product_attention(query, key, value).split([q.shape[2] for q in queries], 2)

    @staticmethod
    def bidirectional_cross_attention(
        x_query: Tensor, y_key: Tensor, x_value: Tensor, y_value: Tensor
    ) -> tuple[Tensor, Tensor]:
        scores = x_query @ y_key.mT * x_query.shape[-1] ** -0.5
        return scores.softmax(-1) @ y_value, scores.mT.softmax(-1) @ x_value

    @staticmethod
    def concat_linear(xs: Sequence[Tensor], weight: Tensor, bias: Tensor, *, activation: str | None = None) -> Tensor:
        y = F.linear(torch.cat(list(xs), -1), weight, bias)
        return y if activation is None else getattr(F, activation)(y)

    @staticmethod
    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    @staticmethod
    def gated_fusion(
        xs: Sequence[Tensor], value_weights: Sequence[Tensor], value_biases: None, gate_weight: Tensor
    ) -> Tensor:
        x, y = (torch.tanh(F.linear(x, weight)) for x, weight in zip(xs, value_weights, strict=True))
        gate = F.linear(torch.cat(list(xs), -1), gate_weight).sigmoid()
        return gate * x + (1 - gate) * y

    @staticmethod
    def bilinear_fusion(x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, *, out_weight: Tensor) -> Tensor:
        return F.linear(F.linear(x, x_weight) * F.linear(y, y_weight), out_weight)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, L, H * D] -> [B, H, L, D]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, H * D]"""
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Stack(Workload):
    """A stack is its `run`, with either set of ops."""

    batch: int

    def run(self, ops: Any, **arguments: Any) -> Tensor:
        raise NotImplementedError

    def ours(self, **arguments: Any) -> Tensor:
        return self.run(mmk, **arguments)

    def plain(self, **arguments: Any) -> Tensor:
        return self.run(Plain, **arguments)

    def flops(self) -> float:
        """Of the products, as torch counts them."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            self.plain(**self.inputs())
        return float(counter.get_total_flops())

    def outputs(self) -> int:
        with torch.device("meta"):
            return self.plain(**self.inputs()).numel()


@dataclass(frozen=True)
class Reads(Stack):
    """Queries of one modality read another, and are projected: LXMERT, BLIP-2, Whisper."""

    queries: int
    keys: int
    width: int
    source: int  # width of what is read
    heads: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads} heads, {self.queries}x{self.width} read {self.keys}x{self.source}"

    def inputs(self) -> dict[str, Any]:
        given = {"x": torch.randn(self.batch, self.queries, self.width)}
        given["y"] = torch.randn(self.batch, self.keys, self.source)
        given |= {"query": linear_weight(self.width, self.width), "out": linear_weight(self.width, self.width)}
        return given | {"key_value": linear_weight(2 * self.width, self.source)}

    def run(self, ops: Any, x: Tensor, y: Tensor, query: Tensor, out: Tensor, key_value: Tensor) -> Tensor:
        key, value = (heads(part, self.heads) for part in F.linear(y, key_value).chunk(2, -1))
        return x + F.linear(tokens(ops.cross_attention(heads(F.linear(x, query), self.heads), key, value)), out)


@dataclass(frozen=True)
class Joined(Stack):
    """Two streams attend to all of each other, each with its own weights: the blocks of SD3 and FLUX, and TransFuser's
    without the modulation."""

    lengths: tuple[int, int]
    width: int
    heads: int
    modulated: bool = False

    def __str__(self) -> str:
        kind = " modulated" if self.modulated else ""
        return f"{self.batch}x{self.heads} heads, {self.lengths[0]}+{self.lengths[1]} of {self.width}{kind}"

    def inputs(self) -> dict[str, Any]:
        given: dict[str, Any] = {"xs": [torch.randn(self.batch, length, self.width) for length in self.lengths]}
        given["project"] = [linear_weight(3 * self.width, self.width) for _ in self.lengths]
        if self.modulated:
            given["shifts"], given["scales"] = ([torch.randn(self.batch, self.width) for _ in "xy"] for _ in range(2))
        return given | {"out": [linear_weight(self.width, self.width) for _ in self.lengths]}

    def run(self, ops: Any, xs: Any, project: Any, out: Any, shifts: Any = (), scales: Any = ()) -> Tensor:
        pairs = zip(xs, shifts, scales, strict=True) if self.modulated else ()
        normed = [ops.modulated_norm(*pair) for pair in pairs] or xs
        split = [F.linear(x, weight).chunk(3, -1) for x, weight in zip(normed, project, strict=True)]
        query, key, value = ([heads(part[i], self.heads) for part in split] for i in range(3))
        read = ops.joint_attention(query, key, value)
        return torch.cat([x + F.linear(tokens(r), w) for x, r, w in zip(xs, read, out, strict=True)], 1)


@dataclass(frozen=True)
class BothWays(Stack):
    """Image and words by one table of scores: Grounding DINO's feature enhancer."""

    x: int  # tokens of the image, of all levels
    y: int  # of the text
    width: int
    inner: int
    heads: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads} heads, {self.x}+{self.y} of {self.width} by {self.inner}"

    def inputs(self) -> dict[str, Any]:
        given: dict[str, Any] = {"xs": [torch.randn(self.batch, length, self.width) for length in (self.x, self.y)]}
        given["project"] = [linear_weight(2 * self.inner, self.width) for _ in "xy"]
        return given | {"out": [linear_weight(self.width, self.inner) for _ in "xy"]}

    def run(self, ops: Any, xs: Any, project: Any, out: Any) -> Tensor:
        split = [F.linear(x, weight).chunk(2, -1) for x, weight in zip(xs, project, strict=True)]
        (query, x_value), (key, y_value) = ([heads(part, self.heads) for part in parts] for parts in split)
        read = ops.bidirectional_cross_attention(query, key, x_value, y_value)
        return torch.cat([x + F.linear(tokens(r), w) for x, r, w in zip(xs, read, out, strict=True)], 1)


@dataclass(frozen=True)
class Vectors(Stack):
    """Vectors of two modalities, joined, and a head."""

    kind: str  # concat, gated or bilinear
    widths: tuple[int, int]
    features: int
    classes: int

    def __str__(self) -> str:
        return f"{self.batch}x({self.widths[0]}+{self.widths[1]}) {self.kind} {self.features} to {self.classes}"

    def inputs(self) -> dict[str, Any]:
        given: dict[str, Any] = {"xs": [torch.randn(self.batch, width) for width in self.widths]}
        if self.kind != "concat":
            given["each"] = [linear_weight(self.features, width) for width in self.widths]
        if self.kind != "bilinear":
            given["both"] = linear_weight(self.features, sum(self.widths))
        return given | {"head": linear_weight(self.classes, self.features), "bias": torch.randn(self.features)}

    def run(self, ops: Any, xs: Any, head: Tensor, bias: Tensor, each: Any = (), both: Any = None) -> Tensor:
        if self.kind == "bilinear":
            return ops.bilinear_fusion(*xs, *each, out_weight=head) + bias.sum()
        if self.kind == "gated":
            return F.linear(ops.gated_fusion(xs, each, None, both) + bias, head)
        return F.linear(ops.concat_linear(xs, both, bias, activation="relu"), head)


@dataclass(frozen=True)
class Interacts(Stack):
    """Products of all pairs of fields, the picture one of them, and the first layer above: DLRM with an image."""

    fields: int  # embeddings looked up
    dense: int  # numbers that are no category
    width: int
    picture: int
    features: int

    def __str__(self) -> str:
        return f"{self.batch}x({self.fields} fields, {self.dense} numbers, {self.picture}) by {self.width}"

    def inputs(self) -> dict[str, Any]:
        given = {"found": torch.randn(self.batch, self.fields, self.width)}
        given |= {"numbers": torch.randn(self.batch, self.dense), "picture": torch.randn(self.batch, self.picture)}
        given |= {"dense": linear_weight(self.width, self.dense), "see": linear_weight(self.width, self.picture)}
        joined = (self.fields + 2) * (self.fields + 1) // 2 + self.width + self.picture
        given |= {"both": linear_weight(self.features, joined), "bias": torch.randn(self.features)}
        return given | {"head": linear_weight(1, self.features)}

    def run(
        self,
        ops: Any,
        found: Tensor,
        numbers: Tensor,
        picture: Tensor,
        dense: Tensor,
        see: Tensor,
        both: Tensor,
        bias: Tensor,
        head: Tensor,
    ) -> Tensor:
        known, seen = F.linear(numbers, dense).relu(), F.linear(picture, see)
        fields = torch.cat([known[:, None], seen[:, None], found], 1)
        row, column = torch.tril_indices(fields.shape[1], fields.shape[1], -1, device=found.device)
        pairs = (fields @ fields.mT)[:, row, column]
        return F.linear(ops.concat_linear([pairs, known, picture], both, bias, activation="relu"), head)


STACKS = (
    Reads("visual question answering: LXMERT (Tan & Bansal, 2019), words read regions", 32, 20, 36, 768, 768, 12),
    Reads("visual question answering: BLIP-2 (Li et al., 2023), Q-Former reads ViT-g", 4, 32, 257, 768, 1408, 12),
    BothWays("detection: Grounding DINO (Liu et al., 2023), 480 x 640 image", 1, 6380, 64, 256, 1024, 4),
    Joined("generation: Stable Diffusion 3 (Esser et al., 2024), 512 x 512", 1, (1024, 154), 1536, 24, True),
    Joined("generation: FLUX.1 schnell (Black Forest Labs, 2024), 512 x 512", 1, (1024, 256), 3072, 24, True),
    Joined("driving: TransFuser (Chitta et al., 2022), camera and lidar", 4, (110, 64), 512, 4),
    Vectors("medicine: scan and record (Huang et al., 2020)", 64, "concat", (2048, 128), 512, 2, quick=True),
    Vectors(
        "film and poster genres: gated units (Arevalo et al., 2017)", 64, "gated", (4096, 300), 512, 23, quick=True
    ),
    Interacts("recommendation: DLRM (Naumov et al., 2019) and the item's picture", 256, 26, 13, 128, 2048, 1024),
    Vectors(
        "recommendation: user and picture by MLB (Kim et al., 2017)",
        256,
        "bilinear",
        (128, 2048),
        1200,
        128,
        quick=True,
    ),
    Reads("speech and text: MulT (Tsai et al., 2019), text reads sound", 16, 50, 375, 40, 40, 8, quick=True),
)
REAL_TIME = (
    Reads("real time: Whisper base (Radford et al., 2022), a word reads 30 s", 1, 1, 1500, 512, 512, 8),
    Vectors("real time: one scan and record", 1, "concat", (2048, 128), 512, 2, quick=True),
    Joined("real time: TransFuser, one frame", 1, (110, 64), 512, 4, quick=True),
)

SUITE = Suite(
    "the same stack in plain torch",
    forward={"forward": STACKS, "real time forward": REAL_TIME},
    training={"training": STACKS, "real time training": REAL_TIME},
)
