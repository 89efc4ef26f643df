"""low_rank_fusion in plain PyTorch: the specification every kernel is tested against.

    y = Σ_r w_r Π_i ([1; x_i] F_i[r]) + b,  x_i = 0 where it is absent

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
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


def example_inputs(draw: Draw, B: int = 5, K: int = 6, N: int = 7, R: int = 3) -> Examples:
    return {
        option: {
            "xs": [draw(B, K), draw(B, 3)],
            "factors": [draw(R, K + 1, N), draw(R, 4, N)],
            "rank_weights": draw(R),
            **options,
        }
        for option, options in {
            "presence": {"bias": draw(N), "presence": draw.flags(B, 2)},
            "plain": {},
        }.items()
    }
