"""merge_attention in plain PyTorch: the specification every kernel is tested against.

    lse = log Σ_i exp lse_i,   out = Σ_i exp(lse_i - lse) · out_i

Runs on every device and dtype, in float32 or wider, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples


def merge_attention(
    outputs: Sequence[Tensor],  # M of [*, D]
    lses: Sequence[Tensor],  # M of [*]
) -> tuple[Tensor, Tensor]:
    """Output [*, D] and its LSE [*]. A part whose lse is −inf counts for nothing, whatever its output holds."""
    parts = torch.stack(list(lses))  # [M, *]
    absent = parts == -torch.inf
    top = parts.detach().amax(0)  # a constant shift
    empty = top == -torch.inf
    top = top.masked_fill(empty, 0)
    weights = torch.exp(parts - top)
    total = weights.sum(0).masked_fill(empty, 1)
    lse = (total.log() + top).masked_fill(empty, -torch.inf)
    out = torch.zeros_like(outputs[0], dtype=lse.dtype)
    for output, weight, skipped in zip(outputs, weights / total, absent, strict=True):
        out = out + weight[..., None] * output.to(lse.dtype).masked_fill(skipped[..., None], 0)
    return out.to(outputs[0].dtype), lse


def example_inputs(draw: Draw, B: int = 2, H: int = 2, L: int = 6, D: int = 8) -> Examples:
    return {"two": {"outputs": [draw(B, H, L, D) for _ in range(2)], "lses": [draw.wide(B, H, L) for _ in range(2)]}}
