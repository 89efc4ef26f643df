"""Matrix products of torch whose rows do not read each other.

torch's product of half-precision matrices on a CPU with AMX takes the depth in pairs, and completes the last pair of an
odd one with the element that follows in memory: the first of the next row, weighed with zero. Where that is NaN or
infinite the row becomes NaN, and what one row holds must not reach another. With zeros to an even size there is no such
pair; that goes for all three sizes, since each is the depth of a product of the backward. Cores without AMX need none.
What is being compiled stays as it is: sizes may be symbols there.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._amx import cpu_lines, torch_uses_amx

_IN_PAIRS = (torch.bfloat16, torch.float16)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of [..., M, K] and [..., K, N]."""
    rows, depth = a.shape[-2:]
    columns = b.shape[-1]
    if not _is_paired(a) or not (rows % 2 or depth % 2 or columns % 2):
        return a @ b
    product = F.pad(a, (0, depth % 2, 0, rows % 2)) @ F.pad(b, (0, columns % 2, 0, depth % 2))
    return product[..., :rows, :columns]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of [*, K] and [N, K]."""
    if not _is_paired(x):
        return F.linear(x, weight, bias)
    lead, depth = x.shape[:-1], x.shape[-1]
    rows, columns = lead.numel(), weight.shape[0]
    if not (rows % 2 or depth % 2 or columns % 2):
        return F.linear(x, weight, bias)
    x, weight = (F.pad(t, (0, t.shape[1] % 2, 0, t.shape[0] % 2)) for t in (x.reshape(rows, depth), weight))
    if bias is not None:
        bias = F.pad(bias, (0, columns % 2))
    return F.linear(x, weight, bias)[:rows, :columns].reshape(*lead, columns)


@functools.cache
def _multiplies_on_tiles() -> bool:
    return torch_uses_amx(cpu_lines(), os.environ)


def _is_paired(t: Tensor) -> bool:
    return t.dtype in _IN_PAIRS and t.is_cpu and not torch.compiler.is_compiling() and _multiplies_on_tiles()
