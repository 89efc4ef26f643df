"""What follows a product, on its tile: bias, activation, gate, residual, and the stores."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.triton.math import activation, tanh


@triton.jit
def finish(
    acc,  # [BLOCK_M, BLOCK_N] float32
    bias,
    residual,
    gate,
    preactivation,
    y,
    row,
    n,
    rows,
    features,
    residual_stride,
    gate_stride,
    y_stride,
    ACTIVATION: tl.constexpr,
):
    """Bias, activation, gate and residual of a tile, and its stores."""
    n_inside = n < features
    inside = (row < rows)[:, None] & n_inside[None, :]
    at = row.to(tl.int64)[:, None] * features + n[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if preactivation is not None:
        tl.store(preactivation + at, acc.to(preactivation.dtype.element_ty), mask=inside)
    acc = activation(acc, ACTIVATION)
    if gate is not None:
        acc *= tanh(tl.load(gate + n * gate_stride, mask=n_inside, other=0.0).to(tl.float32))[None, :]
    if residual is not None:
        residual_at = row.to(tl.int64)[:, None] * residual_stride + n[None, :]
        acc += tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
    y_at = row.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y + y_at, acc.to(y.dtype.element_ty), mask=inside)
