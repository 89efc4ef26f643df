"""varlen_cross_attention on GPUs: the attention core, with members that begin where device tensors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.varlen_cross_attention.op import Arguments
from mmkernels.triton.attention_backward import Queries
from mmkernels.triton.attention_forward import attend
from mmkernels.triton.attention_inputs import Attention
from mmkernels.triton.attention_key_gradients import key_gradients
from mmkernels.triton.attention_query_gradient import query_gradient


def _attention(a: Arguments) -> Attention:
    return Attention(
        keys=[a.key],
        values=[a.value],
        padding=[None],
        scale=scale_of(a.scale, a.query.shape[2]),
        softcap=a.softcap,
        window=(a.window_left, a.window_right),
        bottom_right=a.bottom_right,
        query_ends=a.cu_seqlens_q.contiguous(),
        key_ends=a.cu_seqlens_k.contiguous(),
    )


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, _ = a.query.shape
    out = empty_in_order_of(a.query, (rows, heads, a.value.shape[2]))
    stats = a.query.new_empty((2, heads, rows), dtype=torch.float32)
    wanted = (stats[0], stats[1]) if training or a.return_lse else None
    attend(a.query, _attention(a), out, wanted, a.cu_seqlens_q.shape[0] - 1, a.max_seqlen_q)
    lse = (stats[0] + stats[1]).T.contiguous() if a.return_lse else stats.new_empty(0)
    return out, lse, stats if training else stats.new_empty(0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    out, *_, stats = saved
    grad_log_sum = grads[1].T if a.return_lse else None
    members = a.cu_seqlens_q.shape[0] - 1
    stream = Queries(a.query, grads[0], out, stats[0], stats[1], grad_log_sum, members, a.max_seqlen_q)
    attention = _attention(a)
    dq, dk, dv = (empty_in_order_of(x, x.shape) if wanted else None for x, wanted in zip(a[:3], needed, strict=False))
    deltas = stream.deltas()
    if dq is not None:
        query_gradient(stream, deltas, attention, dq, with_bias=False)
    if dk is not None or dv is not None:
        key_gradients([stream], [deltas], attention, 0, a.max_seqlen_k, dk, dv, None)
    return [a.query.new_empty(0) if x is None else x for x in (dq, dk, dv, None, None, None)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call that makes the core's kernels read where members begin."""
    import mmkernels as mmk

    ends = new(9, dtype=torch.int32)
    yield (
        "packed 8x(1024x77) d64",
        lambda: mmk.varlen_cross_attention(new(8192, 16, 64), new(616, 16, 64), new(616, 16, 64), ends, ends, 1024, 77),
    )
