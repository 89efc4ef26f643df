"""cross_attention to few keys on NVIDIA GPUs, in CUDA C++: csrc/attention/short_key_forward_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import Arguments, empty_in_order_of, new_statistics


def _attention(a: Arguments) -> short_keys.ShortKeys:
    lengths = [] if a.key_lengths is None else [a.key_lengths]
    factor = scale_of(a.scale, a.key.shape[3])
    return short_keys.ShortKeys([a.key], [a.value], lengths, [0] * len(lengths), factor, mask=a.attn_mask)


def forward(kernels: Library, a: Arguments, training: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    out = empty_in_order_of(a.query, a.query.shape)
    stats, statistics = new_statistics(a.query, a.return_lse or training)
    short_keys.attend(kernels, a.query, _attention(a), out, statistics)
    return out, [stats.sum(0)] if a.return_lse else [], stats if training else stats.new_empty(0)


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    query, key, value, attn_mask, *_ = a
    of_query, of_key, of_value, of_mask, *_ = needed
    out, *_, (row_max, log_sum) = saved
    grad_out, grad_lse = grads[0], grads[1].contiguous() if len(grads) > 1 else None
    attention = _attention(a)
    stream = short_keys.Queries(query, grad_out, out, row_max, log_sum, grad_lse)
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if wanted else None
        for x, wanted in ((query, of_query), (key, of_key), (value, of_value))
    )
    size = (*query.shape[:3], attention.total)
    dscores = query.new_empty(size, dtype=torch.float32) if of_mask else None
    deltas = short_keys.query_gradient(kernels, stream, attention, dq, dscores, exact=of_mask)
    if dk is not None or dv is not None:
        short_keys.gradients(kernels, [stream], [deltas], [attention], [dk], [dv], with_bias=False)
    dmask = None
    if dscores is not None and attn_mask is not None:
        dmask = dscores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    return [query.new_empty(0) if x is None else x for x in (dq, dk, dv, dmask, None, None, None, None)]
