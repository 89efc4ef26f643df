"""The forward of concat_linear with tensor descriptors, by which Hopper and later load tiles without a register or an
address: of large half-precision products with up to four sources and no presence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels.triton.epilogue import finish
from mmkernels.triton.launch import Config, ceil_div, launch, target, tiles

SOURCES = 4  # descriptors are arguments by themselves: triton 3.6 takes none in a tuple


@triton.jit
def _along(acc, x, weight, first_row, first_n, column, width, BLOCK_K: tl.constexpr):
    """acc and the product of a source, whose columns of the weight begin at ``column``."""
    for k in range(0, width, BLOCK_K):
        acc = tl.dot(x.load([first_row, k]), weight.load([first_n, column + k]).T, acc)
    return acc


@triton.jit(do_not_specialize=["rows"])
def _forward_by_descriptors(
    x0,  # descriptors of [rows, K] each, or None
    x1,
    x2,
    x3,
    weight,  # that of [N, ΣK]
    widths,  # K
    bias,  # [N] or None
    residual,  # [rows, N] or None
    gate,  # [N] or [1], or None
    preactivation,  # z, [rows, N], or None
    y,  # [rows, N]
    rows,
    features,  # N
    residual_stride,
    gate_stride,  # 0 where one gate is for all features
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_N)
    m = tl.program_id(0) // columns * BLOCK_M
    first = tl.program_id(0) % columns * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _along(acc, x0, weight, m, first, 0, widths[0], BLOCK_K)
    if x1 is not None:
        acc = _along(acc, x1, weight, m, first, widths[0], widths[1], BLOCK_K)
    if x2 is not None:
        acc = _along(acc, x2, weight, m, first, widths[0] + widths[1], widths[2], BLOCK_K)
    if x3 is not None:
        acc = _along(acc, x3, weight, m, first, widths[0] + widths[1] + widths[2], widths[3], BLOCK_K)
    finish(
        acc, bias, residual, gate, preactivation, y, m + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), rows,
        features, residual_stride, gate_stride, features, ACTIVATION,
    )  # fmt: skip


_CONFIG = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3)


def pays(sources: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether the descriptors can be had, and a tile for every multiprocessor."""
    machine = target(weight)
    if machine.backend != "cuda" or machine.arch < 90 or weight.dtype == torch.float32 or len(sources) > SOURCES:
        return False
    rows, features = sources[0].shape[0], weight.shape[0]
    return ceil_div(rows, 128) * ceil_div(features, 128) >= 132 and describable(sources, weight)


def describable(sources: Sequence[Tensor], weight: Tensor) -> bool:
    """Whether all begin, and go from row to row, at multiples of 16 bytes, none is one row that is expanded, and each
    source is a whole number of blocks wide."""
    block, tensors = _CONFIG.constants["BLOCK_K"], (*sources, weight)
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    apart = all(t.stride(0) >= t.shape[1] for t in tensors)
    return aligned and apart and all(x.shape[1] > 0 and x.shape[1] % block == 0 for x in sources)


def forward_by_descriptors(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    gate: Tensor | None,
    gate_stride: int,
    z: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y and, where it is wanted, z."""
    (rows, _), features = sources[0].shape, weight.shape[0]
    m, n, k = _CONFIG.constants.values()
    descriptors = [TensorDescriptor.from_tensor(x, [m, k]) for x in sources]
    launch(
        _forward_by_descriptors,
        (tiles(_CONFIG, rows, features),),
        *(*descriptors, *[None] * (SOURCES - len(sources)), TensorDescriptor.from_tensor(weight, [n, k])),
        *(tuple(x.shape[1] for x in sources), bias, residual, gate, z, y),
        *(rows, features, 0 if residual is None else residual.stride(0), gate_stride),
        ACTIVATION=activation,
        config=_CONFIG,
    )
