"""tensor_fusion_linear in plain PyTorch: the specification every kernel is tested against.

    y = W · vec([1; x₁] ⊗ … ⊗ [1; x_M]) + b,  x_i = 0 where it is absent

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times. It holds the outer product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import where_present


def tensor_fusion_linear(
    xs: Sequence[Tensor],  # M of [B, D_i]
    weight: Tensor,  # [N, Π (D_i + 1)], the first modality's index slowest
    bias: Tensor | None,  # [N]
    presence: Tensor | None = None,  # [B, M] or [M] bool
) -> Tensor:
    """Output [B, N]."""
    one = xs[0].new_ones(xs[0].shape[0], 1)
    fused = one
    for x in where_present(xs, presence):
        factor = torch.cat([one, x], -1)  # [B, D_i + 1]
        fused = (fused.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return linear(fused, weight, bias)


def example_inputs(draw: Draw, B: int = 5, K: int = 6, N: int = 7) -> Examples:
    return {
        option: {"xs": [draw(B, K), draw(B, 3)], "weight": draw(N, 4 * (K + 1)), "bias": draw(N), "presence": presence}
        for option, presence in {"presence": draw.flags(B, 2), "plain": None}.items()
    }
