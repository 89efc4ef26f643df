"""Matrix products of torch whose rows do not read each other.

torch's product of half-precision matrices on a CPU with AMX cuts the depth into blocks of one length, at most 32, and
takes a block in pairs. Where the length of the blocks is odd or no whole number, the last pair is completed with the
element that follows in memory: the first of the next row, weighed with zero. Where that is NaN or infinite the row
becomes NaN, and what one row holds must not reach another. With zeros to a size of whole pairs there is no such
element; where there is a backward that goes for all three sizes, since each is the depth of one of its products.
Without one, zeros behind the rows are enough, and the other operand stays as it is, which may be far larger; of a
batch torch copies such rows to where there are none. Cores without AMX need no zeros. What is being compiled stays as
it is: sizes may be symbols there.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._amx import cpu_lines, torch_uses_amx

_IN_PAIRS = (torch.bfloat16, torch.float16)
_BLOCK = 32  # elements, at most


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of [..., M, K] and [..., K, N]."""
    if not _is_paired(a):
        return a @ b
    rows, depth, columns = *a.shape[-2:], b.shape[-1]
    if a.dim() == b.dim() == 2 and not _has_backward(a, b):
        return _with_zeros_behind(a) @ b
    more_rows, more_depth, more_columns = (_missing(size) for size in (rows, depth, columns))
    if not (more_rows or more_depth or more_columns):
        return a @ b
    product = F.pad(a, (0, more_depth, 0, more_rows)) @ F.pad(b, (0, more_columns, 0, more_depth))
    return product[..., :rows, :columns]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of [*, K] and [N, K]."""
    if not _is_paired(x):
        return F.linear(x, weight, bias)
    lead, depth = x.shape[:-1], x.shape[-1]
    rows, columns = lead.numel(), weight.shape[0]
    if not _has_backward(x, weight):
        if _missing(depth) == 0:
            return F.linear(x, weight, bias)
        return F.linear(_with_zeros_behind(x.reshape(rows, depth)), weight, bias).reshape(*lead, columns)
    more_rows, more_depth, more_columns = (_missing(size) for size in (rows, depth, columns))
    if not (more_rows or more_depth or more_columns):
        return F.linear(x, weight, bias)
    x = F.pad(x.reshape(rows, depth), (0, more_depth, 0, more_rows))
    weight = F.pad(weight, (0, more_depth, 0, more_columns))
    if bias is not None:
        bias = F.pad(bias, (0, more_columns))
    return F.linear(x, weight, bias)[:rows, :columns].reshape(*lead, columns)


def _has_backward(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in operands)


def _with_zeros_behind(rows: Tensor) -> Tensor:
    """The same [M, K], with zeros behind each row where its last pair is not whole, as many as a block may read."""
    depth = rows.shape[1]
    return F.pad(rows, (0, -depth % _BLOCK))[:, :depth] if _missing(depth) else rows


def _missing(size: int) -> int:
    """What it lacks to be one of whole pairs: its blocks, of one length, of an even one."""
    whole = size
    while whole % (2 * max(1, -(-whole // _BLOCK))):
        whole += 1
    return whole - size


@functools.cache
def _multiplies_on_tiles() -> bool:
    return torch_uses_amx(cpu_lines(), os.environ)


def _is_paired(t: Tensor) -> bool:
    return t.dtype in _IN_PAIRS and t.is_cpu and not torch.compiler.is_compiling() and _multiplies_on_tiles()
