"""joint_attention to few keys on NVIDIA GPUs, in CUDA C++: csrc/attention/short_key_forward_cuda.cuh, which takes the
keys of all streams as segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops._attention_checks import scale_of
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.joint_attention.op import Arguments, statistics_of_streams


def _attentions(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_lengths: Sequence[Tensor],
    padded_streams: Sequence[int],
    stream_bias: Tensor | None,
    scale: float | None,
) -> list[short_keys.ShortKeys]:
    """What each stream of queries attends to."""
    heads, dim = queries[0].shape[1], queries[0].shape[3]
    factor = scale_of(scale, dim)
    biases: list[Tensor | None] = [None] * len(queries)
    if stream_bias is not None:
        full = stream_bias.float().expand(heads, len(queries), len(keys))
        biases = [full[:, i].contiguous() for i in range(len(queries))]
    return [short_keys.ShortKeys(keys, values, key_lengths, padded_streams, factor, bias=b) for b in biases]


def forward(kernels: Library, a: Arguments, training: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    queries, keys, values, key_lengths, padded_streams, stream_bias, scale, _, _, _, return_lse = a
    attentions = _attentions(queries, keys, values, key_lengths, padded_streams, stream_bias, scale)
    outs = [empty_in_order_of(q, q.shape) for q in queries]
    stats = queries[0].new_empty(2 * sum(math.prod(q.shape[:3]) for q in queries), dtype=torch.float32)
    statistics = statistics_of_streams(stats, queries)
    for query, attention, out, of_rows in zip(queries, attentions, outs, statistics, strict=True):
        short_keys.attend(kernels, query, attention, out, of_rows if training or return_lse else None)
    lses = [row_max + log_sum for row_max, log_sum in statistics] if return_lse else []
    return outs, lses, stats if training else stats.new_empty(0)


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    queries, keys, values, key_lengths, padded_streams, stream_bias, scale, _, _, _, return_lse = a
    count, segments = len(queries), len(keys)
    grad_lses = grads[count:] if return_lse else [None] * count
    of_queries, of_keys = needed[:count], needed[count : count + segments]
    of_values, of_bias = needed[count + segments : count + 2 * segments], needed[-2] and stream_bias is not None
    attentions = _attentions(queries, keys, values, key_lengths, padded_streams, stream_bias, scale)
    streams = [
        short_keys.Queries(q, g, o, *s, g_lse)
        for q, g, o, s, g_lse in zip(
            queries, grads, saved, statistics_of_streams(saved[-1], queries), grad_lses, strict=False
        )
    ]

    def fresh(x: Tensor, wanted: bool) -> Tensor | None:
        return empty_in_order_of(x, x.shape) if wanted else None

    dqs = [fresh(q, n) for q, n in zip(queries, of_queries, strict=True)]
    dks = [fresh(k, n) for k, n in zip(keys, of_keys, strict=True)]
    dvs = [fresh(v, n) for v, n in zip(values, of_values, strict=True)]
    deltas = [
        short_keys.query_gradient(kernels, stream, attention, dq, exact=bool(of_bias))
        for stream, attention, dq in zip(streams, attentions, dqs, strict=True)
    ]
    grad_bias = None
    if of_bias or any((*of_keys, *of_values)):
        dbias = short_keys.gradients(kernels, streams, deltas, attentions, dks, dvs, bool(of_bias))
        if stream_bias is not None and of_bias:
            total = torch.stack(dbias, 1)  # [H, Sq, Sk]
            grad_bias = (total if stream_bias.dim() == 3 else total.sum(0)).to(stream_bias.dtype)
    without = [None] * len(key_lengths)  # lengths have no gradient
    found = [*dqs, *dks, *dvs, *without, grad_bias, None]  # nor has the random state
    return [queries[0].new_empty(0) if g is None else g for g in found]
