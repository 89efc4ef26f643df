"""The norm of rows of features that a program holds in registers, [ROWS, BLOCK] in float32, and its gradient.

    x̂ = (x − mean) / √(variance + eps)     layer
    x̂ = x / √(mean x² + eps)               rms
    x̂ = x                                  None

Launch kernels that take the gradient with ``enable_fp_fusion=False``: a product fused into a difference is not rounded
as the sum over the row was, and what must cancel does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.launch import Config, next_power_of_2


@triton.jit
def normalized(x, inside, features, eps, NORM: tl.constexpr):
    """x̂, 0 where not ``inside``, and rstd, a column.

    The mean of the centred row is what the first mean was off by, which is much where x is far from zero.
    """
    rstd = 1.0
    if NORM == "layer":
        x = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / features, 0.0)
        x = tl.where(inside, x - tl.sum(x, 1, keep_dims=True) / features, 0.0)
    if NORM is not None:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / features + eps)
        x = tl.where(inside, x * rstd, 0.0)
    return x, rstd


@triton.jit
def norm_gradient(dn, n, rstd, features, NORM: tl.constexpr):
    """The gradient of x from that of n = x̂, which is 0 beyond the row's end."""
    if NORM is not None:
        along = tl.sum(dn * n, 1, keep_dims=True) / features
        if NORM == "layer":
            dn = dn - tl.sum(dn, 1, keep_dims=True) / features
        dn = (dn - n * along) * rstd
    return dn


def row_config(features: int, rows: int) -> Config:
    """Tiles of 1024 elements, or one row: narrow rows together keep as many bytes in flight as a wide one.

    A thread has eight elements, 16 bytes of a half-precision row. No more rows than the next power of two of ``rows``.
    """
    block = next_power_of_2(features)
    together = min(max(1024 // block, 1), 64, next_power_of_2(rows))
    warps = min(max(together * block // 256, 1), 16)
    return Config({"ROWS": together, "BLOCK": block}, num_warps=warps, num_stages=1)
