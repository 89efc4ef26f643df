"""The forward of attention with tensor descriptors, by which Hopper and later load keys and values without a register
or an address: of much half-precision attention over up to four segments, with no mask, window, bias, softcap or
dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkernels.triton.attention import load_tokens, online_softmax, store_tokens
from mmkernels.triton.attention_inputs import Attention, token_strides
from mmkernels.triton.launch import Config, ceil_div, launch, odd, target
from mmkernels.triton.math import number

SEGMENTS = 4  # descriptors are arguments by themselves: triton 3.6 takes none in a tuple
_LEAST_FLOPS = 2**35  # about 0.1 ms of a large GPU: less does not repay the host for making descriptors


@triton.jit
def _attend(
    q, k, v, b, h, begin, end, length, scale, row_max, total, acc,
    WHOLE: tl.constexpr,  # no key is beyond the length
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """row_max, total and acc after the keys [begin, end) of a segment."""
    for start in range(begin, end, BLOCK_N):
        s = tl.dot(q, k.load([b, h, start, 0]).reshape(BLOCK_N, D).T)
        if not WHOLE:
            s = tl.where((start + tl.arange(0, BLOCK_N) < length)[None, :], s, -float("inf"))
        p, rescale, row_max, total = online_softmax(s, scale, row_max, total)
        x = v.load([b, h, start, 0]).reshape(BLOCK_N, D)
        acc = tl.dot(p.to(x.dtype), x, acc * rescale[:, None])
    return row_max, total, acc


@triton.jit
def _attend_segment(q, k, v, b, h, length, scale, row_max, total, acc, BLOCK_N: tl.constexpr, D: tl.constexpr):
    whole = length // BLOCK_N * BLOCK_N
    row_max, total, acc = _attend(q, k, v, b, h, 0, whole, length, scale, row_max, total, acc, True, BLOCK_N, D)
    return _attend(q, k, v, b, h, whole, length, length, scale, row_max, total, acc, False, BLOCK_N, D)


@triton.jit(do_not_specialize=["query_length", "heads"])
def _forward_by_descriptors(
    query,  # [B, Hq, Lq, D]
    out,
    row_maxes,  # [B, Hq, Lq] float32, or None
    log_sums,
    k0,  # descriptors of [B, Hkv, Lk, D] each, or None
    k1,
    k2,
    k3,
    v0,
    v1,
    v2,
    v3,
    key_lengths,  # of each segment, odd
    query_length,
    heads,
    query_strides,  # batch, head, token
    out_strides,
    statistics_strides,  # batch, head, odd
    scale,
    GROUP: tl.constexpr,  # query heads to a key head
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(query_length, BLOCK_M)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    slice = tl.program_id(0) // blocks
    b, h = slice // heads, slice % heads
    q_base = query + b.to(tl.int64) * query_strides[0] + h.to(tl.int64) * query_strides[1]
    q = load_tokens(q_base, query_strides[2], m, query_length, D, D)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    g = h // GROUP
    length = number(key_lengths[0])
    row_max, total, acc = _attend_segment(q, k0, v0, b, g, length, scale, row_max, total, acc, BLOCK_N, D)
    if k1 is not None:
        length = number(key_lengths[1])
        row_max, total, acc = _attend_segment(q, k1, v1, b, g, length, scale, row_max, total, acc, BLOCK_N, D)
    if k2 is not None:
        length = number(key_lengths[2])
        row_max, total, acc = _attend_segment(q, k2, v2, b, g, length, scale, row_max, total, acc, BLOCK_N, D)
    if k3 is not None:
        length = number(key_lengths[3])
        row_max, total, acc = _attend_segment(q, k3, v3, b, g, length, scale, row_max, total, acc, BLOCK_N, D)
    acc /= total[:, None]
    out += b.to(tl.int64) * out_strides[0] + h.to(tl.int64) * out_strides[1]
    store_tokens(out, out_strides[2], m, query_length, D, acc)
    if row_maxes is not None:
        at = b.to(tl.int64) * number(statistics_strides[0]) + h.to(tl.int64) * number(statistics_strides[1]) + m
        tl.store(row_maxes + at, row_max, mask=m < query_length)
        tl.store(log_sums + at, tl.log(total), mask=m < query_length)


def _config(dim: int) -> Config:
    """As measured on an H200, and that the stages fit in its shared memory."""
    if dim == 64:
        return Config({"BLOCK_M": 64, "BLOCK_N": 128}, 4, 3)
    return Config({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 3)


def pays(query: Tensor, attention: Attention) -> bool:
    """Whether the descriptors can be had, and there is enough to do for their making."""
    machine, (dim, value_dim), keys = target(query), attention.head_dims, attention.keys
    if machine.backend != "cuda" or machine.arch < 90 or query.dtype == torch.float32 or query.dim() != 4:
        return False
    if attention.heavy or attention.softcap or attention.stream_bias is not None or attention.scale <= 0:
        return False
    if any(lengths is not None for lengths in attention.padding):
        return False
    if dim not in (64, 128) or dim != value_dim or len(keys) > SEGMENTS:
        return False
    flops = 4 * query.shape[:3].numel() * sum(k.shape[2] for k in keys) * dim
    return flops >= _LEAST_FLOPS and all(map(describable, (*keys, *attention.values)))


def describable(x: Tensor) -> bool:
    """Whether it begins, and goes on in each dim, at multiples of 16 bytes, and nothing in it is expanded or empty."""
    step = 16 // x.element_size()
    along = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return x.data_ptr() % 16 == 0 and 0 not in x.shape and all(s >= x.shape[3] and s % step == 0 for s in along)


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Of blocks of tokens. A dim of one element goes on by what a descriptor can be told, wherever its stride leads."""
    shape, strides = list(x.shape), list(x.stride())
    strides[:3] = [stride if size > 1 else shape[3] for size, stride in zip(shape[:3], strides, strict=False)]
    return TensorDescriptor(x, shape, strides, [1, 1, block, shape[3]])


def attend_by_descriptors(
    query: Tensor, attention: Attention, out: Tensor, statistics: Sequence[Tensor] | None
) -> None:
    """As `mmkernels.triton.attention_forward.attend`, where it `pays`."""
    batch, heads, length, dim = query.shape
    config = _config(dim)
    block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
    absent = [None] * (SEGMENTS - len(attention.keys))
    launch(
        _forward_by_descriptors,
        (ceil_div(length, block_m) * batch * heads,),
        *(query, out, *(statistics or (None, None))),
        *(*(_descriptor(k, block_n) for k in attention.keys), *absent),
        *(*(_descriptor(v, block_n) for v in attention.values), *absent),
        *(odd([k.shape[2] for k in attention.keys]), length, heads),
        *(token_strides(query), token_strides(out), odd(statistics[0].stride()[:2] if statistics else (0, 0))),
        attention.scale,
        GROUP=heads // attention.keys[0].shape[1],
        D=dim,
        config=config,
    )
