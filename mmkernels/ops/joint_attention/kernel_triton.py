"""joint_attention on GPUs: the attention core, one launch for every stream of queries over all segments of keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.joint_attention.op import Arguments, statistics_of_streams
from mmkernels.triton.attention_backward import Queries
from mmkernels.triton.attention_forward import attend
from mmkernels.triton.attention_inputs import Attention
from mmkernels.triton.attention_key_gradients import key_gradients
from mmkernels.triton.attention_query_gradient import query_gradient


def _attention(a: Arguments, stream_bias: Tensor | None) -> Attention:
    """What all query streams attend to; ``stream_bias`` is that of one of them, [H or 1, Sk]."""
    lengths = {j: x.contiguous() for j, x in zip(a.padded_streams, a.key_lengths, strict=True)}
    return Attention(
        keys=a.keys,
        values=a.values,
        padding=[lengths.get(j) for j in range(len(a.keys))],
        scale=scale_of(a.scale, a.keys[0].shape[3]),
        softcap=a.softcap,
        stream_bias=stream_bias,
        dropout_p=a.dropout_p,
        rng_state=a.rng_state,
    )


def _bias(stream_bias: Tensor | None) -> Tensor | None:
    """[H or 1, Sq, Sk], dense."""
    if stream_bias is None:
        return None
    return (stream_bias if stream_bias.dim() == 3 else stream_bias[None]).contiguous()


def forward(a: Arguments, training: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    queries, values = a.queries, a.values
    bias = _bias(a.stream_bias)
    outs = [empty_in_order_of(q, (*q.shape[:3], values[0].shape[3])) for q in queries]
    stats = queries[0].new_empty(2 * sum(math.prod(q.shape[:3]) for q in queries), dtype=torch.float32)
    statistics = statistics_of_streams(stats, queries)
    for i, (query, out) in enumerate(zip(queries, outs, strict=True)):
        of_stream = None if bias is None else bias[:, i]
        attention = _attention(a, of_stream)
        wanted = statistics[i] if training or a.return_lse else None
        attend(query, attention, out, wanted, query.shape[0], query.shape[2])
    lses = [row_max + log_sum for row_max, log_sum in statistics] if a.return_lse else []
    return outs, lses, stats if training else stats.new_empty(0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    queries, keys, values = a.queries, a.keys, a.values
    count, segments = len(queries), len(keys)
    grad_lses = grads[count:] if a.return_lse else [None] * count
    statistics = statistics_of_streams(saved[-1], queries)
    of_queries, of_keys = needed[:count], needed[count : count + segments]
    of_values, of_bias = needed[count + segments : count + 2 * segments], needed[-2]
    streams = [
        Queries(q, g, o, *s, g_lse, q.shape[0], q.shape[2])
        for q, g, o, s, g_lse in zip(queries, grads, saved, statistics, grad_lses, strict=False)
    ]
    deltas = [stream.deltas() for stream in streams]
    bias = _bias(a.stream_bias)

    def fresh(x: Tensor, wanted: bool) -> Tensor | None:
        return empty_in_order_of(x, x.shape) if wanted else None

    dqs = [fresh(q, n) for q, n in zip(queries, of_queries, strict=True)]
    dbias = []
    for i, (stream, dq) in enumerate(zip(streams, dqs, strict=True)):
        if dq is not None or of_bias:
            of_stream = None if bias is None else bias[:, i]
            attention = _attention(a, of_stream)
            dbias.append(query_gradient(stream, deltas[i], attention, dq, with_bias=of_bias))
    dks = [fresh(k, n) for k, n in zip(keys, of_keys, strict=True)]
    dvs = [fresh(v, n) for v, n in zip(values, of_values, strict=True)]
    attention = _attention(a, None)
    for j, (dk, dv) in enumerate(zip(dks, dvs, strict=True)):
        if dk is not None or dv is not None:
            of_segment = None if bias is None else bias[:, :, j].contiguous()
            key_gradients(streams, deltas, attention, j, keys[j].shape[2], dk, dv, of_segment)
    grad_bias = None
    if of_bias and a.stream_bias is not None:
        total = torch.stack([d for d in dbias if d is not None], 1)  # [H, Sq, Sk]
        grad_bias = (total if a.stream_bias.dim() == 3 else total.sum(0)).to(a.stream_bias.dtype)
    without = [None] * len(a.key_lengths)  # lengths have no gradient
    found = [*dqs, *dks, *dvs, *without, grad_bias, None]  # nor has the random state
    return [queries[0].new_empty(0) if g is None else g for g in found]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for each set of features that changes the core's kernels."""
    import mmkernels as mmk

    def call(dim: int, lengths: Sequence[int], bias: bool) -> Any:
        streams = [[new(2, 24, n, dim) for n in lengths] for _ in range(3)]
        return mmk.joint_attention(*streams, stream_bias=new(24, 2, 2) if bias else None)

    yield "2x24 512+4096 d128", lambda: call(128, (512, 4096), False)
    yield "2x24 77+1024 d64, bias", lambda: call(64, (77, 1024), True)
