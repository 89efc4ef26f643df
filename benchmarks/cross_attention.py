"""cross_attention: what is measured, and against what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import mmkernels as mmk
from mmkernels.bench import Case, Problem

BASELINE = "torch SDPA"


@dataclass(frozen=True)
class Shape:
    """Sizes and masking of one attention; `kv_heads` 0 means as many as `heads`."""

    note: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    kv_heads: int = 0
    padded: bool = False  # key_lengths spread evenly over [keys / 2, keys]
    causal: Literal["", "top_left", "bottom_right"] = ""
    window: int = -1  # keys to the left of the diagonal
    softcap: float = 0.0

    def __str__(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        flags = [{"": "", "top_left": "causal", "bottom_right": "causal from the end"}[self.causal]]
        flags += ["padded" * self.padded, f"window {self.window}" if self.window >= 0 else ""]
        flags += [f"softcap {self.softcap:g}" if self.softcap else ""]
        extra = ", ".join(filter(None, flags))
        return f"{self.batch}x{heads} {self.queries}x{self.keys} d{self.dim}" + (f" {extra}" if extra else "")

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    def key_lengths(self) -> Tensor | None:
        return torch.linspace(self.keys // 2, self.keys, self.batch).long() if self.padded else None

    def allowed(self) -> Tensor | None:
        """Bool mask [B or 1, 1, Lq or 1, Lk] of the pairs that may attend, None where all may."""
        key, mask = torch.arange(self.keys), torch.ones(1, 1, 1, 1, dtype=torch.bool)
        lengths = self.key_lengths()
        if lengths is not None:
            mask = mask & (key < lengths.view(-1, 1, 1, 1))
        if self.causal:
            valid = torch.tensor(self.keys) if lengths is None else lengths.view(-1, 1, 1, 1)
            shift = valid - self.queries if self.causal == "bottom_right" else 0
            diagonal = torch.arange(self.queries).view(-1, 1) + shift
            mask = mask & (key <= diagonal)
            if self.window >= 0:
                mask = mask & (key >= diagonal - self.window)
        return mask if mask.numel() > 1 else None


# The sizes that multimodal models have: text and image tokens, latents and prompts, resamplers, detection queries.
DENSE = (
    Shape("32x32 latents, 77 prompt tokens", 1, 8, 1024, 77, 64),
    Shape("ViT-B/16 patches, 32 text tokens", 8, 12, 196, 32, 64),
    Shape("64x64 latents, 77 prompt tokens", 1, 16, 4096, 77, 64),
    Shape("ViT-B 24x24 patches, both sides", 2, 12, 576, 576, 64),
    Shape("1024 tokens, both sides", 1, 8, 1024, 1024, 64),
    Shape("256 tokens, both sides, wide heads", 4, 8, 256, 256, 128),
    Shape("64 text tokens, 1601 image tokens", 1, 8, 64, 1601, 128),
    Shape("32 text tokens, ViT-B/16 patches", 16, 12, 32, 196, 64),
)
FEW_QUERIES = (
    Shape("decoding, 576 image tokens", 1, 12, 1, 576, 64),
    Shape("decoding, 1601 image tokens", 8, 8, 1, 1601, 128),
    Shape("decoding 4 tokens, 4096 keys", 1, 32, 4, 4096, 128),
)
MASKED = (
    Shape("ViT-B/16 patches, padded captions", 8, 12, 196, 77, 64, padded=True),
    Shape("causal, grouped heads", 1, 16, 512, 512, 64, kv_heads=4, causal="top_left"),
    Shape("last 128 tokens of a padded video", 2, 8, 128, 1024, 64, padded=True, causal="bottom_right"),
    Shape("local window of 128 keys", 1, 8, 1024, 1024, 64, causal="top_left", window=128),
    Shape("capped logits", 2, 8, 256, 256, 128, softcap=30.0),
)
# Padding and a position bias that all examples share, as in T5 and LayoutLM: two masks for us, their sum for torch.
BIASED = Shape("T5: padded texts, position bias", 4, 8, 256, 256, 64, padded=True)
# What keeps a GPU busy.
LARGE = (
    Shape("128x128 latents, 77 prompt tokens", 2, 20, 16384, 77, 64),
    Shape("4096 tokens, both sides", 2, 16, 4096, 4096, 64),
    Shape("4096 tokens, both sides, wide heads", 2, 16, 4096, 4096, 128),
    Shape("batches of ViT-L patches, 77 text tokens", 64, 16, 576, 77, 64),
    Shape("resampler: 64 latents, 8 x 576 image tokens", 16, 16, 64, 4608, 128),
    Shape("decoding, grouped heads, 32k keys", 8, 32, 1, 32768, 128, kv_heads=8),
)


def eager(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, mask: Tensor | None, softcap: float
) -> Tensor:
    """The formula in plain PyTorch, as models write it: softmax in float32 or wider."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    wide = torch.promote_types(query.dtype, torch.float32)
    return torch.softmax(scores, -1, dtype=wide).to(query.dtype) @ value


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, shape: Shape, mask: Tensor | None
) -> Tensor:
    """torch's best for the same result: its causal flag where that suffices, else a mask prepared beforehand."""
    if shape.softcap:  # torch has no such attention
        return eager(query, key, value, bias, mask=mask, softcap=shape.softcap)
    gqa = bool(shape.kv_heads)
    if shape.causal == "top_left" and shape.window < 0 and not shape.padded:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias if mask is None else mask, enable_gqa=gqa)


def ours(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, shape: Shape, mask: Tensor | None
) -> Tensor:
    biased = bias is not None
    return mmk.cross_attention(
        query,
        key,
        value,
        attn_mask=mask if biased else None,
        attn_bias=bias,
        key_lengths=None if biased else shape.key_lengths(),
        is_causal=bool(shape.causal),
        causal_alignment=shape.causal or "top_left",
        window=(shape.window, 0) if shape.window >= 0 else None,
        softcap=shape.softcap,
        enable_gqa=bool(shape.kv_heads),
    )


def _with_kernel(kernel: SDPBackend, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's attention held to one of its kernels."""

    def call(*leaves: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return attention(*leaves)

    return call


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def flex(query: Tensor, key: Tensor, value: Tensor, *, shape: Shape) -> Tensor:
    """FlexAttention without a mask."""
    return _compiled_flex()(query, key, value, enable_gqa=bool(shape.kv_heads))


def one_by_one(attention: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """torch's kernels for a GPU."""
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    kernels["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    return {name: _with_kernel(kernel, attention) for name, kernel in kernels.items()}


def problem(shape: Shape, training: bool, bias: bool, dtype: torch.dtype) -> Problem:
    sizes = [
        (shape.batch, shape.heads, shape.queries, shape.dim),
        (shape.batch, shape.key_heads, shape.keys, shape.dim),
        (shape.batch, shape.key_heads, shape.keys, shape.dim),
    ]
    if bias:
        sizes.append((1, shape.heads, shape.queries, shape.keys))
    mask = shape.allowed()
    leaves = tuple(torch.randn(size).to(dtype).requires_grad_(training) for size in sizes)
    attention = partial(sdpa, shape=shape, mask=mask)
    on_a_gpu, plain = leaves[0].is_cuda and not shape.softcap, mask is None and not bias
    return Problem(
        leaves=leaves,
        names=("query", "key", "value", "attn_bias")[: len(sizes)],
        ours=partial(ours, shape=shape, mask=mask),
        torch=attention,
        eager=partial(eager, mask=mask, softcap=shape.softcap),
        others=one_by_one(attention) if on_a_gpu else {},
        compiling={"flex": partial(flex, shape=shape)} if on_a_gpu and plain else {},
    )


def flops(shape: Shape, training: bool) -> float:
    """Two products forward, five more backward (the scores are formed again), over the pairs that may attend."""
    mask = shape.allowed()
    share = 1.0 if mask is None else mask.double().mean().item()
    pairs = shape.batch * shape.heads * shape.queries * shape.keys * share
    return 2 * pairs * shape.dim * (7 if training else 2)


def bytes_moved(shape: Shape, training: bool, bias: bool, itemsize: int) -> float:
    """Inputs read and outputs written once a pass; the backward reads both and the output's gradient."""
    query = shape.batch * shape.heads * shape.queries * shape.dim  # output and its gradient are as large
    keys = 2 * shape.batch * shape.key_heads * shape.keys * shape.dim
    scores = shape.heads * shape.queries * shape.keys if bias else 0
    forward = 2 * query + keys + scores
    backward = 4 * query + 2 * keys + 2 * scores
    return itemsize * float(forward + backward if training else forward)


def case(
    group: str,
    shape: Shape,
    *,
    training: bool = False,
    bias: bool = False,
    quick: bool = False,
    gpu: bool = False,
) -> Case:
    return Case(
        group=group,
        shape=str(shape),
        note=shape.note,
        problem=partial(problem, shape, training, bias),
        flops=flops(shape, training),
        bytes=partial(bytes_moved, shape, training, bias),
        training=training,
        quick=quick,
        gpu=gpu,
    )


def cases() -> list[Case]:
    small = DENSE[1]
    rows = [case("forward", s, quick=s is small) for s in DENSE]
    rows += [case("training", s, training=True, quick=s is small) for s in DENSE]
    rows += [
        case("bias training", s, training=True, bias=True, quick=s is small) for s in (DENSE[1], DENSE[5], DENSE[7])
    ]
    rows += [case("few queries", s, quick=s is FEW_QUERIES[0]) for s in FEW_QUERIES]
    rows += [case("masked forward", s, quick=s is not MASKED[3]) for s in MASKED]
    rows += [case("masked training", s, training=True) for s in MASKED[:2]]
    rows += [case("masked forward", BIASED, bias=True), case("masked training", BIASED, training=True, bias=True)]
    rows += [case("large forward", s, gpu=True) for s in LARGE]
    rows += [case("large training", s, training=True, gpu=True) for s in LARGE[:-1]]
    return rows
