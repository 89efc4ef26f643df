"""cross_attention to few keys on NVIDIA GPUs, in CUDA C++: csrc/attention/short_key_forward_cuda.cuh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels._cuda import Library
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops.cross_attention.op import empty_in_order_of


def _attention(
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: None,
    sinks: None,
    key_lengths: Tensor | None,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
    scale: float,
    *dropout: Any,
) -> short_keys.ShortKeys:
    lengths = [] if key_lengths is None else [key_lengths]
    return short_keys.ShortKeys([key], [value], lengths, [0] * len(lengths), scale, mask=attn_mask)


def forward(
    kernels: Library, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *of_attention, with_lse = options
    out = empty_in_order_of(query, query.shape)
    size = query.shape[:3] if with_lse else (0,)
    row_max, log_sum = (query.new_empty(size, dtype=torch.float32) for _ in range(2))
    statistics = (row_max, log_sum) if with_lse else None
    short_keys.attend(kernels, query, _attention(key, value, *of_attention), out, statistics)
    return out, row_max, log_sum


def backward(
    kernels: Library,
    grad_out: Tensor,
    grad_log_sum: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: None,
    sinks: None,
    key_lengths: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    *of_attention, (of_query, of_key, of_value, of_mask, _, _) = options
    attention = _attention(key, value, attn_mask, attn_bias, sinks, key_lengths, *of_attention)
    stream = short_keys.Queries(query, grad_out, out, row_max, log_sum, grad_log_sum)
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if needed else None
        for x, needed in ((query, of_query), (key, of_key), (value, of_value))
    )
    size = (*query.shape[:3], attention.total)
    dscores = query.new_empty(size, dtype=torch.float32) if of_mask else None
    deltas = short_keys.query_gradient(kernels, stream, attention, dq, dscores, exact=of_mask)
    if dk is not None or dv is not None:
        short_keys.gradients(kernels, [stream], [deltas], [attention], [dk], [dv], with_bias=False)
    dmask = None
    if dscores is not None and attn_mask is not None:
        dmask = dscores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return tuple(query.new_empty(0) if x is None else x for x in (dq, dk, dv, dmask, None, None))
