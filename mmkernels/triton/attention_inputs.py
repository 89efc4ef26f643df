"""What the kernels of attention are launched with, apart from the queries: tensors, strides, numbers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmkernels.triton.launch import next_power_of_2

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Attention:
    """What queries attend to, and how: everything but the queries."""

    keys: Sequence[Tensor]  # segments, [B, Hkv, Lk, D] each, or packed [rows, Hkv, D]
    values: Sequence[Tensor]
    padding: Sequence[Tensor | None]  # [B] of each
    scale: float
    softcap: float = 0.0
    mask: Tensor | None = None  # [1|B, 1|Hq, 1|Lq, 1|Lk]
    stream_bias: Tensor | None = None  # [H or 1, segments]
    window: tuple[int, int] = (-1, -1)
    bottom_right: bool = False
    dropout_p: float = 0.0
    rng_state: Tensor | None = None  # [2], on the CPU
    query_ends: Tensor | None = None  # [B + 1] of packed sequences
    key_ends: Tensor | None = None

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.keys[0].shape[-1], self.values[0].shape[-1]

    @property
    def masked(self) -> bool:
        """Whether a key may be hidden from one query of a block and not from another."""
        return self.mask is not None or self.window != (-1, -1)

    @property
    def heavy(self) -> bool:
        """Whether the indices of masks or the words of dropout take registers."""
        return self.masked or self.dropout_p > 0

    @property
    def widest(self) -> int:
        """The wider head dim, as it is padded."""
        dims = self.padded_dims()
        return max(dims["BLOCK_D"], dims["BLOCK_DV"])

    def masks(self) -> tuple[Any, ...]:
        """Mask and stream bias, as the kernels take them: pointers, then strides."""
        mask, bias = self.mask, self.stream_bias
        mask_strides: Strides = (0,) * 4
        if mask is not None:
            mask_strides = tuple(s if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True))
        bias_stride = 0 if bias is None or bias.shape[0] == 1 else bias.stride(0)
        return mask, bias, mask_strides, bias_stride

    def windows(self) -> tuple[int | None, int | None]:
        """Left and right, None where unbounded; positions and their sums are 32 bits in the kernels."""
        left, right = (None if side < 0 or side >= 2**30 else side for side in self.window)
        return left, right

    def randomness(self) -> tuple[int, int, int, int, float]:
        """Seed, offset and threshold as signed words, and what a survivor is multiplied by."""
        if self.rng_state is None or self.dropout_p == 0:
            return 0, 0, 0, 0, 1.0
        seed, offset = self.rng_state.tolist()
        threshold = min(int(self.dropout_p * 2**32), 2**32 - 1)
        words = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, offset & 0xFFFFFFFF, threshold)
        low, high, at, least = (w - 2**32 if w >= 2**31 else w for w in words)
        return low, high, at, least, 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0

    def padded_dims(self) -> Mapping[str, int]:
        return padded_dims(*self.head_dims)


@functools.cache
def padded_dims(d: int, dv: int) -> Mapping[str, int]:
    """Constants of a kernel: the head dims, and the powers of two that hold them."""
    sizes = {"BLOCK_D": max(next_power_of_2(d), 16), "BLOCK_DV": max(next_power_of_2(dv), 16)}
    return {"D": d, "DV": dv, **sizes}


def token_strides(x: Tensor) -> Strides:
    """Of batch, head and token; a packed tensor [rows, H, D] has no batch."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, strides[1], strides[0])


def segment_strides(xs: Sequence[Tensor]) -> Strides:
    return token_strides(xs[0]) if len(xs) == 1 else tuple(s for x in xs for s in token_strides(x))
