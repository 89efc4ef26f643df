"""low_rank_fusion in plain PyTorch: the specification every kernel is tested against.

    y = Σ_r w_r Π_i ([1; x_i] F_i[r]) + b,  x_i = 0 where it is absent

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._products import matmul
from mmkernels.ops.concat_linear.reference import where_present


def low_rank_fusion(
    xs: Sequence[Tensor],  # M of [B, D_i]
    factors: Sequence[Tensor],  # M of [R, D_i + 1, N]
    rank_weights: Tensor,  # [R]
    bias: Tensor | None,  # [N]
    presence: Tensor | None = None,  # [B, M] or [M] bool
) -> Tensor:
    """Output [B, N]."""
    one = xs[0].new_ones(xs[0].shape[0], 1)
    product: Tensor | None = None
    for x, factor in zip(where_present(xs, presence), factors, strict=True):
        projection = matmul(torch.cat([one, x], -1), factor)  # [R, B, N]
        product = projection if product is None else product * projection
    assert product is not None
    y = (rank_weights[:, None, None] * product).sum(0)
    return y if bias is None else y + bias


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: embeddings of text, audio and video, as in sentiment analysis."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    widths, rank, features = (32, 16, 8), 4, 64
    return {
        "xs": [random(8, width) for width in widths],
        "factors": [random(rank, width + 1, features) / (width + 1) ** 0.5 for width in widths],
        "rank_weights": random(rank),
        "bias": random(features),
    }
