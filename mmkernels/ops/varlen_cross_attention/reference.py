"""varlen_cross_attention in plain PyTorch: the specification every kernel is tested against.

It is `cross_attention` of one member of the batch after the other.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops.cross_attention import reference


def varlen_cross_attention(
    query: Tensor,  # [Tq, Hq, D]
    key: Tensor,  # [Tk, Hkv, D]
    value: Tensor,  # [Tk, Hkv, Dv]
    cu_seqlens_q: Tensor,  # [B + 1] int32 or int64, where the members start
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,  # -1 = unbounded
    window_right: int,  # -1 = unbounded, 0 = causal
    bottom_right: bool,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,  # [Hq] float32, or float64 as the inputs
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output [Tq, Hq, Dv] and, with ``return_lse``, the LSE [Tq, Hq]."""
    options = (window_left, window_right, bottom_right, scale, softcap, sinks)
    out, row_max, log_sum = _attend(query, key, value, cu_seqlens_q, cu_seqlens_k, *options)
    return out.transpose(0, 1), (row_max + log_sum).T if return_lse else row_max.new_empty(0)


def softmax_stats(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> tuple[Tensor]:
    """row_max and log_sum, [2, Hq, Tq]."""
    _, _, *of_attention, _ = options
    _, row_max, log_sum = _attend(query, key, value, cu_seqlens_q, cu_seqlens_k, *of_attention)
    return (torch.stack([row_max, log_sum]),)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [Hq, Tq, Dv], row_max and log_sum [Hq, Tq]."""
    options = (None, None, sinks, None, window_left, window_right, bottom_right, softcap, scale, 0.0, None)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    outs = [query.new_empty(query.shape[1], 0, value.shape[2])]
    row_maxes = [query.new_empty(query.shape[1], 0, dtype=wide)]
    log_sums = [query.new_empty(query.shape[1], 0, dtype=wide)]
    rows, keys = itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist())
    for (row, row_end), (first, end) in zip(rows, keys, strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (query[row:row_end], key[first:end], value[first:end]))
        for parts, part in zip((outs, row_maxes, log_sums), reference.cross_attention(q, k, v, *options), strict=True):
            parts.append(part[0])
    return torch.cat(outs, 1), torch.cat(row_maxes, 1), torch.cat(log_sums, 1)


def example_inputs(draw: Draw, Tq: int = 7, Tk: int = 9, H: int = 2, D: int = 8, Dv: int = 4) -> Examples:
    return {
        option: {
            "query": draw(Tq, H, D),
            "key": draw(Tk, heads, D),
            "value": draw(Tk, heads, Dv),
            "cu_seqlens_q": torch.tensor([0, Tq // 2, Tq // 2, Tq]),
            "cu_seqlens_k": torch.tensor([0, Tk // 2, Tk // 2, Tk]),
            "max_seqlen_q": Tq,
            "max_seqlen_k": Tk,
            **options,
        }
        for option, heads, options in (
            ("plain", H, {}),
            ("causal, LSE", 1, {"is_causal": True, "return_lse": True}),
        )
    }
