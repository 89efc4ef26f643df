"""Registration of joint_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops._attention_checks import too_wide_for_triton
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.joint_attention import reference


class Arguments(NamedTuple):
    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    key_lengths: Sequence[Tensor]
    padded_streams: Sequence[int]
    stream_bias: Tensor | None
    scale: float | None
    softcap: float
    dropout_p: float
    rng_state: Tensor | None
    return_lse: bool


_MAX_STREAMS = 8  # kMaxSegments of csrc/attention/attention.h


def _joint_attention_fake(a: Arguments) -> tuple[Any, ...]:
    queries, first = a.queries, a.queries[0]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    outs = [empty_in_order_of(q, (*q.shape[:3], a.values[0].shape[3])) for q in queries]
    lses = [q.new_empty(q.shape[:3], dtype=wide) for q in queries] if a.return_lse else []
    rows = first.shape[0] * first.shape[1] * sum(q.shape[2] for q in queries)
    return outs, lses, first.new_empty(2 * rows, dtype=wide)


def statistics_of_streams(stats: Tensor, queries: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """row_max and log_sum of each stream, [B, H, L_i] parts of what the forward saves."""
    sizes = [math.prod(q.shape[:3]) for q in queries]
    halves = [half.split(sizes) for half in stats.view(2, -1)]
    return [(a.view(q.shape[:3]), b.view(q.shape[:3])) for a, b, q in zip(*halves, queries, strict=True)]


def _gradient(leaf: Tensor, _: str) -> Tensor:
    return empty_in_order_of(leaf, leaf.shape) if leaf.dim() == 4 else leaf.new_empty(leaf.shape)


def _supports(a: Arguments) -> str | None:
    if max(len(a.queries), len(a.keys)) > _MAX_STREAMS:
        return f"there are more than {_MAX_STREAMS} streams"
    return None


def _cuda_supports(a: Arguments, backward: bool = False) -> str | None:
    if a.softcap or a.dropout_p > 0:
        return "its kernel has no softcap or dropout"
    return _supports(a) or short_keys.declines(a.queries, a.keys, a.values, backward)


def _cuda_loses(a: Arguments) -> str | None:
    return short_keys.loses(a.keys)


def _triton_supports(a: Arguments) -> str | None:
    if a.dropout_p > 0 and max(len(a.queries), len(a.keys)) > 1:
        return "its kernels count dropout within a stream, not along all of them"
    return too_wide_for_triton(a.queries[0], a.values[0])


joint_attention_op = DifferentiableOp(
    "joint_attention",
    Arguments,
    outputs="Tensor[] outs, Tensor[] lses",
    saved="Tensor stats",  # row_max of all query streams, then log_sum, in the memory order of [B, H, L_i] each
    reference=reference.joint_attention,
    reference_saved=reference.softmax_stats,
    fake=_joint_attention_fake,
    cpu=NativeKernels(_supports),
    cuda=CudaKernels(_cuda_supports, functools.partial(_cuda_supports, backward=True), _cuda_loses),
    triton=TritonKernels(_triton_supports),
    keeps=EVERYTHING_AND_OUTPUTS,
    gradient=_gradient,
)
