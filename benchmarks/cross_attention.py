"""cross_attention: what is measured, and against what."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import mmkernels as mmk
from mmkernels.bench import Suite, Workload
from mmkernels.bench.plain import attention

SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Shape(Workload):
    """Sizes and masking of one attention; `kv_heads` 0 means as many as `heads`."""

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
    bias: bool = False  # one that all examples share

    backward_flops = 2.5  # five products, of which one forms the scores again
    kept = 1  # the output, for the backward

    def __str__(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}" if self.kv_heads else f"{self.heads}"
        flags = [{"": "", "top_left": "causal", "bottom_right": "causal from the end"}[self.causal]]
        flags += ["padded" * self.padded, f"window {self.window}" if self.window >= 0 else ""]
        flags += [f"softcap {self.softcap:g}" if self.softcap else ""]
        extra = ", ".join(filter(None, flags))
        return f"{self.batch}x{heads} {self.queries}x{self.keys} d{self.dim}" + (f" {extra}" if extra else "")

    def inputs(self) -> dict[str, Tensor]:
        query = torch.randn(self.batch, self.heads, self.queries, self.dim)
        key, value = (torch.randn(self.batch, self.kv_heads or self.heads, self.keys, self.dim) for _ in range(2))
        bias = {"attn_bias": torch.randn(1, self.heads, self.queries, self.keys)} if self.bias else {}
        return {"query": query, "key": key, "value": value, **bias}

    def options(self) -> dict[str, Any]:
        return {"attn_mask": self.allowed()} if self.bias else {"key_lengths": self.key_lengths()}

    def torch_options(self, options: Any) -> dict[str, Any]:
        return {"mask": self.allowed()}

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

    def ours(self, **arguments: Any) -> Tensor:
        return mmk.cross_attention(
            **arguments,
            is_causal=bool(self.causal),
            causal_alignment=self.causal or "top_left",
            window=(self.window, 0) if self.window >= 0 else None,
            softcap=self.softcap,
            enable_gqa=bool(self.kv_heads),
        )

    def plain(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, *, mask: Tensor | None
    ) -> Tensor:
        return attention(query, key, value, attn_bias, mask=mask, softcap=self.softcap)

    def baseline(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, *, mask: Tensor | None
    ) -> Tensor:
        """torch's best for the same result: its causal flag where that suffices, else a mask prepared beforehand."""
        if self.softcap:  # torch has no such attention
            return self.plain(query, key, value, attn_bias, mask=mask)
        sdpa = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=bool(self.kv_heads))
        if self.causal == "top_left" and self.window < 0 and not self.padded:
            return sdpa(is_causal=True)
        if attn_bias is not None and mask is not None:
            mask = attn_bias.masked_fill(~mask, -torch.inf)
        return sdpa(attn_mask=attn_bias if mask is None else mask)

    def others(self, device: str) -> dict[str, Callable[..., Tensor]]:
        """torch's kernels for a GPU."""
        kernels = {} if device == "cpu" or self.softcap else SDPA_KERNELS
        return {name: partial(self._with_kernel, kernel) for name, kernel in kernels.items()}

    def _with_kernel(self, kernel: SDPBackend, **arguments: Any) -> Tensor:
        with sdpa_kernel(kernel):
            return self.baseline(**arguments)

    def compiling(self, device: str) -> dict[str, Callable[..., Tensor]]:
        can = device != "cpu" and not (self.softcap or self.bias) and self.allowed() is None
        return {"flex": self._flex} if can else {}

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, mask: None) -> Tensor:
        return _compiled_flex()(query, key, value, enable_gqa=bool(self.kv_heads))

    def flops(self) -> float:
        """Two products over the pairs that may attend."""
        mask = self.allowed()
        return 4.0 * self.outputs() * self.keys * (1.0 if mask is None else mask.double().mean().item())

    def outputs(self) -> int:
        return self.batch * self.heads * self.queries * self.dim


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


# The sizes that multimodal models have: text and image tokens, latents and prompts, resamplers, detection queries.
DENSE = (
    Shape("32x32 latents, 77 prompt tokens", 1, 8, 1024, 77, 64),
    Shape("ViT-B/16 patches, 32 text tokens", 8, 12, 196, 32, 64, quick=True),
    Shape("64x64 latents, 77 prompt tokens", 1, 16, 4096, 77, 64),
    Shape("ViT-B 24x24 patches, both sides", 2, 12, 576, 576, 64),
    Shape("1024 tokens, both sides", 1, 8, 1024, 1024, 64),
    Shape("256 tokens, both sides, wide heads", 4, 8, 256, 256, 128),
    Shape("64 text tokens, 1601 image tokens", 1, 8, 64, 1601, 128),
    Shape("32 text tokens, ViT-B/16 patches", 16, 12, 32, 196, 64),
)
FEW_QUERIES = (
    Shape("decoding, 576 image tokens", 1, 12, 1, 576, 64, quick=True),
    Shape("decoding, 1601 image tokens", 8, 8, 1, 1601, 128),
    Shape("decoding 4 tokens, 4096 keys", 1, 32, 4, 4096, 128),
)
MASKED = (
    Shape("ViT-B/16 patches, padded captions", 8, 12, 196, 77, 64, padded=True, quick=True),
    Shape("causal, grouped heads", 1, 16, 512, 512, 64, kv_heads=4, causal="top_left", quick=True),
    Shape("last 128 tokens of a padded video", 2, 8, 128, 1024, 64, padded=True, causal="bottom_right", quick=True),
    Shape("local window of 128 keys", 1, 8, 1024, 1024, 64, causal="top_left", window=128),
    Shape("capped logits", 2, 8, 256, 256, 128, softcap=30.0, quick=True),
)
# Padding and a position bias that all examples share, as in T5 and LayoutLM: two masks for us, their sum for torch.
BIASED = Shape("T5: padded texts, position bias", 4, 8, 256, 256, 64, padded=True, bias=True)
# What keeps a GPU busy.
LARGE = (
    Shape("128x128 latents, 77 prompt tokens", 2, 20, 16384, 77, 64, gpu=True),
    Shape("4096 tokens, both sides", 2, 16, 4096, 4096, 64, gpu=True),
    Shape("4096 tokens, both sides, wide heads", 2, 16, 4096, 4096, 128, gpu=True),
    Shape("batches of ViT-L patches, 77 text tokens", 64, 16, 576, 77, 64, gpu=True),
    Shape("resampler: 64 latents, 8 x 576 image tokens", 16, 16, 64, 4608, 128, gpu=True),
    Shape("decoding, grouped heads, 32k keys", 8, 32, 1, 32768, 128, kv_heads=8, gpu=True),
)

SUITE = Suite(
    "torch SDPA",
    forward={"forward": DENSE, "few queries": FEW_QUERIES, "masked forward": (*MASKED, BIASED), "large forward": LARGE},
    training={
        "training": DENSE,
        "bias training": [replace(DENSE[i], bias=True) for i in (1, 5, 7)],
        "masked training": (*(replace(shape, quick=False) for shape in MASKED[:2]), BIASED),
        "large training": LARGE[:-1],
    },
)
