"""merge_attention in plain PyTorch: the specification every kernel is tested against.

    lse = log Σ_i exp lse_i,   out = Σ_i exp(lse_i - lse) · out_i

Runs on every device and dtype, in float32 or wider, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops.cross_attention import reference as attention


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


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, list[Tensor]]:
    """Attention of the same queries over two sets of keys."""
    inputs = attention.example_inputs(dtype, device, seed)
    options = (None, None, None, None, -1, -1, False, 0.0, 32**-0.5, 0.0, None)
    halves = [(inputs["key"][:, :, part], inputs["value"][:, :, part]) for part in (slice(0, 20), slice(20, 49))]
    parts = [attention.cross_attention(inputs["query"], key, value, *options) for key, value in halves]
    return {"outputs": [out for out, _, _ in parts], "lses": [top + log for _, top, log in parts]}
