"""cross_attention on GPUs: the attention core with one segment of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._triton import dense
from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import Arguments, empty_in_order_of, new_statistics
from mmkernels.triton.attention_backward import Queries
from mmkernels.triton.attention_forward import attend
from mmkernels.triton.attention_inputs import Attention
from mmkernels.triton.attention_key_gradients import key_gradients
from mmkernels.triton.attention_mask_gradient import mask_gradient
from mmkernels.triton.attention_query_gradient import query_gradient


def _one_mask(attn_mask: Tensor | None, attn_bias: Tensor | None) -> Tensor | None:
    """What both add to the scores, in the shape that they broadcast to; −inf hides whatever it is added to."""
    if attn_mask is None or attn_bias is None:
        return attn_mask
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, attn_bias, -torch.inf)
    total = attn_mask.to(torch.float32) + attn_bias
    return total.masked_fill((attn_mask == -torch.inf) | (attn_bias == -torch.inf), -torch.inf)


def _attention(a: Arguments) -> Attention:
    return Attention(
        keys=[dense(a.key)],
        values=[dense(a.value)],
        padding=[None if a.key_lengths is None else a.key_lengths.contiguous()],
        scale=scale_of(a.scale, a.key.shape[3]),
        softcap=a.softcap,
        mask=_one_mask(a.attn_mask, a.attn_bias),
        window=(a.window_left, a.window_right),
        bottom_right=a.bottom_right,
        dropout_p=a.dropout_p,
        rng_state=a.rng_state,
    )


def forward(a: Arguments, training: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    batch, heads, queries, _ = a.query.shape
    out = empty_in_order_of(a.query, (batch, heads, queries, a.value.shape[3]))
    stats, statistics = new_statistics(a.query, a.return_lse or training)
    attend(dense(a.query), _attention(a), out, statistics, batch, queries)
    return out, [stats.sum(0)] if a.return_lse else [], stats if training else stats.new_empty(0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    query, key, value, attn_mask, attn_bias, *_ = a
    of_query, of_key, of_value, of_mask, of_bias, *_ = needed
    out, *_, (row_max, log_sum) = saved
    grad_out, grad_lse = grads[0], grads[1].contiguous() if len(grads) > 1 else None
    batch, _, queries, _ = query.shape
    stream = Queries(dense(query), dense(grad_out), dense(out), row_max, log_sum, grad_lse, batch, queries)
    attention = _attention(a)
    dq, dk, dv = (
        empty_in_order_of(x, x.shape) if wanted else None
        for x, wanted in ((query, of_query), (key, of_key), (value, of_value))
    )
    deltas = stream.deltas()
    if dq is not None:
        query_gradient(stream, deltas, attention, dq, with_bias=False)
    if dk is not None or dv is not None:
        key_gradients([stream], [deltas], attention, 0, key.shape[2], dk, dv, None)
    dscores = mask_gradient(stream, deltas, attention) if of_mask or of_bias else None
    dmask, dbias = (
        dscores.sum_to_size(x.shape).to(x.dtype) if wanted and dscores is not None and x is not None else None
        for x, wanted in ((attn_mask, of_mask), (attn_bias, of_bias))
    )
    if dmask is not None and dbias is not None and dmask.shape == dbias.shape:
        dbias = dbias.clone()  # the two may be one tensor
    return [query.new_empty(0) if x is None else x for x in (dq, dk, dv, dmask, dbias, None, None, None)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each configuration of the core's tables, and each set of features that changes its kernels."""
    import mmkernels as mmk

    def call(batch: int, heads: int, queries: int, keys: int, dim: int, **options: Any) -> Any:
        query, key, value = (new(batch, heads, n, dim) for n in (queries, keys, keys))
        served = dim <= 128 or query.dtype != torch.float32
        return mmk.cross_attention(query, key, value, **options) if served else query

    yield "2x16 4096x77 d64", lambda: call(2, 16, 4096, 77, 64)
    yield "1x8 1024x77 d64", lambda: call(1, 8, 1024, 77, 64)
    yield "2x16 4096x4096 d128", lambda: call(2, 16, 4096, 4096, 128)
    yield "2x16 4096x4096 d64", lambda: call(2, 16, 4096, 4096, 64)
    yield "1x8 1024x1601 d128", lambda: call(1, 8, 1024, 1601, 128)
    yield "2x8 1024x512 d256", lambda: call(2, 8, 1024, 512, 256)
    yield "2x16 1x4096 d128", lambda: call(2, 16, 1, 4096, 128)
    yield "2x16 4096x4096 d64 causal", lambda: call(2, 16, 4096, 4096, 64, is_causal=True)
    yield (
        "2x16 1024x1024 d64 bias, dropout",
        lambda: call(2, 16, 1024, 1024, 64, attn_mask=new(1, 16, 1024, 1024), dropout_p=0.1),
    )
