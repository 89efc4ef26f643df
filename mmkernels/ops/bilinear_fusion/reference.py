"""bilinear_fusion in plain PyTorch: the specification every kernel is tested against.

    z_n = Σ_{j < rank} (x Uᵀ)_{n·rank + j} · (y Vᵀ)_{n·rank + j},  x or y = 0 where it is absent

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear, matmul
from mmkernels.ops.concat_linear.reference import where_present


def bilinear_fusion(
    x: Tensor,  # [B, Kx]
    y: Tensor,  # [B, Ky]
    x_weight: Tensor,  # [rank·N, Kx]
    y_weight: Tensor,  # [rank·N, Ky]
    rank: int,
    presence: Tensor | None = None,  # [B, 2] or [2] bool, x then y
) -> Tensor:
    """Output [B, N]."""
    x, y = where_present((x, y), presence)
    product = linear(x, x_weight) * linear(y, y_weight)  # [B, rank·N]
    return product.unflatten(-1, (product.shape[-1] // rank, rank)).sum(-1)


def projections(
    x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, rank: int, presence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the backward keeps: U xᵀ and V yᵀ, [rank·N, B]."""
    x, y = where_present((x, y), presence)
    return matmul(x_weight, x.mT).contiguous(), matmul(y_weight, y.mT).contiguous()


def example_inputs(draw: Draw, B: int = 5, Kx: int = 6, Ky: int = 4, N: int = 7, C: int = 5) -> Examples:
    return {
        "a layer behind it": {
            "x": draw(B, Kx),
            "y": draw(B, Ky),
            "x_weight": draw(2 * N, Kx),
            "y_weight": draw(2 * N, Ky),
            "out_weight": draw(C, N),
            "out_bias": draw(C),
            "rank": 2,
            "presence": draw.flags(B, 2),
        },
        "plain": {"x": draw(B, Kx), "y": draw(B, Ky), "x_weight": draw(N, Kx), "y_weight": draw(N, Ky)},
    }
