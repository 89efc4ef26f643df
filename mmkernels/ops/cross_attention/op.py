"""Registration of cross_attention: schema, shapes of its outputs, backends."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import EVERYTHING_AND_OUTPUTS
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops import _short_key_attention as short_keys
from mmkernels.ops._attention_checks import too_wide_for_triton
from mmkernels.ops.cross_attention import batching, reference


class Arguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    attn_bias: Tensor | None
    sinks: Tensor | None
    key_lengths: Tensor | None
    window_left: int
    window_right: int
    bottom_right: bool
    softcap: float
    scale: float | None
    dropout_p: float
    rng_state: Tensor | None
    enable_gqa: bool
    return_lse: bool


def empty_in_order_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A dense tensor whose leading dims lie in memory in the order of ``like``'s, the last dim innermost."""
    strides_of_like = like.stride()
    order = list(range(len(shape) - 1))
    if strides_of_like[-1] == 1 or like.shape[-1] <= 1:
        first = 1 if order and strides_of_like[0] == 0 else 0  # an expanded batch stays outermost
        order[first:] = sorted(order[first:], key=strides_of_like.__getitem__, reverse=True)
    strides, step = [1] * len(shape), shape[-1]
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return like.new_empty_strided(tuple(shape), strides)


def _gradient(leaf: Tensor, name: str) -> Tensor:
    return empty_in_order_of(leaf, leaf.shape) if name in ("query", "key", "value") else leaf.new_empty(leaf.shape)


def _cross_attention_fake(a: Arguments) -> tuple[Any, ...]:
    query, rows = a.query, a.query.shape[:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = [query.new_empty(rows, dtype=wide)] if a.return_lse else []
    return empty_in_order_of(query, (*rows, a.value.shape[3])), lse, query.new_empty((2, *rows), dtype=wide)


def _reference(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *of_attention, _, return_lse = arguments
    out, row_max, log_sum = reference.cross_attention(*of_attention)
    return out, [row_max + log_sum] if return_lse else []


def _reference_saved(*arguments: Any) -> tuple[Tensor]:
    *of_attention, _, _ = arguments
    _, row_max, log_sum = reference.cross_attention(*of_attention)
    return (torch.stack([row_max, log_sum]),)


def new_statistics(query: Tensor, wanted: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What a kernel saves, to be written, and row_max and log_sum in it."""
    stats = query.new_empty((2, *query.shape[:3]) if wanted else 0, dtype=torch.float32)
    return stats, (stats[0], stats[1]) if wanted else None


def unexpanded(mask: Tensor) -> Tensor:
    """The mask [B, Hq, Lq, Lk] with every repeated (stride 0) dim at length 1."""
    for dim in range(4):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _cuda_supports(a: Arguments, backward: bool = False) -> str | None:
    if a.sinks is not None:
        return "its kernel has no sinks"
    if a.attn_bias is not None:
        return "its kernel takes attn_mask or attn_bias, not both"
    if a.window_left >= 0 or a.window_right >= 0 or a.softcap or a.dropout_p > 0:
        return "its kernel has no window, causal mask, softcap or dropout"
    if a.attn_mask is not None and a.attn_mask.dtype not in (torch.bool, torch.float32, a.query.dtype):
        return f"attn_mask is {a.attn_mask.dtype}"
    return short_keys.declines([a.query], [a.key], [a.value], backward)


def _cuda_loses(a: Arguments) -> str | None:
    return short_keys.loses([a.key])


def _triton_supports(a: Arguments, heavy: bool = False) -> str | None:
    if a.sinks is not None:
        return "its kernels have no sinks"
    return too_wide_for_triton(a.query, a.value, heavy=heavy)


def _triton_supports_backward(needed: Sequence[bool], a: Arguments) -> str | None:
    return _triton_supports(a, heavy=a.dropout_p > 0 or needed[3] or needed[4])


cross_attention_op = DifferentiableOp(
    "cross_attention",
    Arguments,
    outputs="Tensor out, Tensor[] lse",
    saved="Tensor stats",  # row_max, a constant shift of the scores, and log_sum, which add up to the LSE
    reference=_reference,
    reference_saved=_reference_saved,
    fake=_cross_attention_fake,
    cpu=NativeKernels(any_strides=True),
    cuda=CudaKernels(_cuda_supports, functools.partial(_cuda_supports, backward=True), _cuda_loses),
    triton=TritonKernels(_triton_supports, _triton_supports_backward, any_strides=True),
    keeps=EVERYTHING_AND_OUTPUTS,
    gradient=_gradient,
    batching=(batching.forward, batching.backward),
)
