"""varlen_cross_attention on GPUs: the attention core, with members that begin where device tensors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.triton.attention_backward import Queries
from mmkernels.triton.attention_forward import attend
from mmkernels.triton.attention_inputs import Attention
from mmkernels.triton.attention_key_gradients import key_gradients
from mmkernels.triton.attention_query_gradient import query_gradient


def _attention(
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
    sinks: None,
) -> Attention:
    dim = query.shape[2]
    return Attention(
        keys=[key],
        values=[value],
        padding=[None],
        scale=scale_of(scale, dim),
        softcap=softcap,
        window=(window_left, window_right),
        bottom_right=bottom_right,
        query_ends=cu_seqlens_q.contiguous(),
        key_ends=cu_seqlens_k.contiguous(),
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *of_attention, return_lse, training = options
    rows, heads, _ = query.shape
    out = empty_in_order_of(query, (rows, heads, value.shape[2]))
    stats = query.new_empty((2, heads, rows), dtype=torch.float32)
    attention = _attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *of_attention)
    wanted = (stats[0], stats[1]) if training or return_lse else None
    attend(query, attention, out, wanted, cu_seqlens_q.shape[0] - 1, max_seqlen_q)
    lse = (stats[0] + stats[1]).T.contiguous() if return_lse else stats.new_empty(0)
    return out, lse, stats if training else stats.new_empty(0)


def backward(
    grads: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> list[Tensor]:
    *of_attention, return_lse, saved, needed = rest
    out, *_, stats = saved
    grad_log_sum = grads[1].T if return_lse else None
    members = cu_seqlens_q.shape[0] - 1
    stream = Queries(query, grads[0], out, stats[0], stats[1], grad_log_sum, members, max_seqlen_q)
    attention = _attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *of_attention)
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if wanted else None
        for x, wanted in zip((query, key, value), needed, strict=False)
    )
    deltas = stream.deltas()
    if dq is not None:
        query_gradient(stream, deltas, attention, dq, with_bias=False)
    if dk is not None or dv is not None:
        key_gradients([stream], [deltas], attention, 0, max_seqlen_k, dk, dv, None)
    return [query.new_empty(0) if x is None else x for x in (dq, dk, dv, None, None, None)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call that makes the core's kernels read where members begin."""
    import mmkernels as mmk

    ends = new(9, dtype=torch.int32)
    yield (
        "packed 8x(1024x77) d64",
        lambda: mmk.varlen_cross_attention(new(8192, 16, 64), new(616, 16, 64), new(616, 16, 64), ends, ends, 1024, 77),
    )
