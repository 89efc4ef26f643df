"""norm_rotary on GPUs.

    n = x · r ∘ w,  r = 1 / √(mean x² + eps);  without a weight n = x
    y_a = n_a cos − n_b sin,  y_b = n_b cos + n_a sin

Tiling     a program owns TOKENS tokens and a run of heads, first those of queries, then those of keys; the table of its
           tokens stays in registers over the run, a head's tile [TOKENS, D] is read once and written once. The backward
           adds up what heads and tokens share over a program, and torch adds the programs up, in their order.
Pairs      halves are read as two tiles, neighbours as one that is split in registers.
Precision  float32.
Limits     D up to 4096, what the registers of one program hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.norm_rotary.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2

_LENGTHS = ["length", "query_heads", "key_heads", "span"]


@triton.jit
def _load(at, inside, half, features, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """The two of each pair [TOKENS, HALF] and what is not rotated [TOKENS, REST], of the rows that begin at ``at``."""
    i = tl.arange(0, HALF)[None, :]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(at + both, mask=inside & (both < 2 * half), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    else:
        first = tl.load(at + i, mask=inside & (i < half), other=0.0).to(tl.float32)
        second = tl.load(at + half + i, mask=inside & (i < half), other=0.0).to(tl.float32)
    if REST > 0:
        k = 2 * half + tl.arange(0, REST)[None, :]
        rest = tl.load(at + k, mask=inside & (k < features), other=0.0).to(tl.float32)
    else:
        rest = tl.zeros([1, 1], tl.float32)
    return first, second, rest


@triton.jit
def _store(
    at, first, second, rest, inside, half, features,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HALF)[None, :]
    kind = at.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(first, second), [first.shape[0], 2 * HALF])
        tl.store(at + both, x.to(kind), mask=inside & (both < 2 * half))
    else:
        tl.store(at + i, first.to(kind), mask=inside & (i < half))
        tl.store(at + half + i, second.to(kind), mask=inside & (i < half))
    if REST > 0:
        k = 2 * half + tl.arange(0, REST)[None, :]
        tl.store(at + k, rest.to(kind), mask=inside & (k < features))


@triton.jit
def _along(first, second, rest):
    """Sums over the features of each row, a column."""
    return (tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(rest, 1))[:, None]


@triton.jit
def _table(cos_ptr, sin_ptr, batch, token, valid, half, cos_batch, cos_token, sin_batch, sin_token, HALF: tl.constexpr):
    i = tl.arange(0, HALF)[None, :]
    inside = valid & (i < half)
    cos = tl.load(cos_ptr + batch * cos_batch + token * cos_token + i, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + batch * sin_batch + token * sin_token + i, mask=inside, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _rotate_heads(
    x_at, y_at, weight_ptr, x_head, y_head, begin, end, valid, cos, sin, half, features, eps,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    if weight_ptr is not None:
        here = weight_ptr + tl.zeros([1, 1], tl.int32)
        w, v, u = _load(here, tl.full([1, 1], 1, tl.int1), half, features, INTERLEAVED, HALF, REST)
    for h in range(begin, end):
        at = x_at + tl.cast(h, tl.int64) * x_head
        first, second, rest = _load(at, valid, half, features, INTERLEAVED, HALF, REST)
        if weight_ptr is not None:
            squares = _along(first * first, second * second, rest * rest)
            r = 1.0 / tl.sqrt(squares / features + eps)
            first = first * r * w
            second = second * r * v
            rest = rest * r * u
        turned = first * cos - second * sin
        second = second * cos + first * sin
        to = y_at + tl.cast(h, tl.int64) * y_head
        _store(to, turned, second, rest, valid, half, features, INTERLEAVED, HALF, REST)


@triton.jit(do_not_specialize=_LENGTHS)
def _forward(
    query_ptr,  # [B, H, L, D]
    key_ptr,  # [B, Hk, L, D]
    cos_ptr,  # [B or 1, L, R/2]
    sin_ptr,
    query_weight_ptr,  # [D] or None
    key_weight_ptr,
    query_out_ptr,
    key_out_ptr,
    length,  # L
    query_heads,  # H
    key_heads,  # Hk
    features,  # D
    half,  # R/2
    span,  # heads per program
    query_batch,  # strides
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    query_out_batch,
    query_out_head,
    query_out_token,
    key_out_batch,
    key_out_head,
    key_out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    eps,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,  # pairs in registers, a power of two
    REST: tl.constexpr,  # other features there, or 0
):
    blocks = tl.cdiv(length, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    valid = token < length
    cos, sin = _table(cos_ptr, sin_ptr, batch, token, valid, half, cos_batch, cos_token, sin_batch, sin_token, HALF)
    begin = tl.program_id(1) * span
    end = begin + span
    _rotate_heads(
        query_ptr + batch * query_batch + token * query_token,
        query_out_ptr + batch * query_out_batch + token * query_out_token,
        query_weight_ptr, query_head, query_out_head, begin, tl.minimum(end, query_heads),
        valid, cos, sin, half, features, eps, INTERLEAVED, HALF, REST,
    )  # fmt: skip
    _rotate_heads(
        key_ptr + batch * key_batch + token * key_token,
        key_out_ptr + batch * key_out_batch + token * key_out_token,
        key_weight_ptr, key_head, key_out_head,
        tl.maximum(begin - query_heads, 0), tl.minimum(end - query_heads, key_heads),
        valid, cos, sin, half, features, eps, INTERLEAVED, HALF, REST,
    )  # fmt: skip


@triton.jit
def _pull_heads(
    g_at, x_at, dx_at, weight_ptr, dweight_at, g_head, x_head, dx_head, begin, end, valid, cos, sin, dcos, dsin,
    half, features, eps,
    DX: tl.constexpr, TABLES: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Gradients of the heads; returns those of the table with theirs added."""
    NORM: tl.constexpr = weight_ptr is not None
    always = tl.full([1, 1], 1, tl.int1)
    if NORM:
        here = weight_ptr + tl.zeros([1, 1], tl.int32)
        w, v, u = _load(here, always, half, features, INTERLEAVED, HALF, REST)
        dw = cos * 0.0
        dv = cos * 0.0
        du = tl.zeros([cos.shape[0], REST if REST > 0 else 1], tl.float32)
    for h in range(begin, end):
        g, f, e = _load(
            g_at + tl.cast(h, tl.int64) * g_head, valid, half, features, INTERLEAVED, HALF, REST
        )  # fmt: skip
        if NORM or TABLES:
            at = x_at + tl.cast(h, tl.int64) * x_head
            first, second, rest = _load(at, valid, half, features, INTERLEAVED, HALF, REST)
        if NORM:
            squares = _along(first * first, second * second, rest * rest)
            r = 1.0 / tl.sqrt(squares / features + eps)
            first = first * r
            second = second * r
            rest = rest * r
        if TABLES:
            if NORM:
                a = first * w
                b = second * v
            else:
                a = first
                b = second
            dcos += g * a + f * b
            dsin += f * a - g * b
        d = g * cos + f * sin
        f = f * cos - g * sin
        if NORM:
            dw += d * first
            dv += f * second
            du += e * rest
            d = d * w
            f = f * v
            e = e * u
            along = _along(d * first, f * second, e * rest) / features
            d = (d - first * along) * r
            f = (f - second * along) * r
            e = (e - rest * along) * r
        if DX:
            to = dx_at + tl.cast(h, tl.int64) * dx_head
            _store(to, d, f, e, valid, half, features, INTERLEAVED, HALF, REST)
    if dweight_at is not None:
        to = dweight_at + tl.zeros([1, 1], tl.int32)
        dw = tl.sum(dw, 0, keep_dims=True)
        dv = tl.sum(dv, 0, keep_dims=True)
        _store(to, dw, dv, tl.sum(du, 0, keep_dims=True), always, half, features, INTERLEAVED, HALF, REST)
    return dcos, dsin


@triton.jit(do_not_specialize=_LENGTHS)
def _backward(
    query_grad_ptr,  # [B, H, L, D]
    key_grad_ptr,
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    dquery_ptr,  # [B, H, L, D] or None
    dkey_ptr,
    dcos_ptr,  # [groups, B, L, R/2] float32, or None
    dsin_ptr,
    dquery_weight_ptr,  # [groups, B · blocks, D] float32, or None
    dkey_weight_ptr,
    length,
    query_heads,
    key_heads,
    features,
    half,
    span,
    query_grad_batch,
    query_grad_head,
    query_grad_token,
    key_grad_batch,
    key_grad_head,
    key_grad_token,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    dquery_batch,
    dquery_head,
    dquery_token,
    dkey_batch,
    dkey_head,
    dkey_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    eps,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    TABLES: tl.constexpr = dcos_ptr is not None or dsin_ptr is not None
    blocks = tl.cdiv(length, TOKENS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    valid = token < length
    cos, sin = _table(cos_ptr, sin_ptr, batch, token, valid, half, cos_batch, cos_token, sin_batch, sin_token, HALF)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    begin = tl.program_id(1) * span
    end = begin + span
    dcos = cos * 0.0
    dsin = cos * 0.0
    if dquery_ptr is not None:
        dquery_ptr += batch * dquery_batch + token * dquery_token
    if dkey_ptr is not None:
        dkey_ptr += batch * dkey_batch + token * dkey_token
    if dquery_weight_ptr is not None:
        dquery_weight_ptr += program * features
    if dkey_weight_ptr is not None:
        dkey_weight_ptr += program * features
    dcos, dsin = _pull_heads(
        query_grad_ptr + batch * query_grad_batch + token * query_grad_token,
        query_ptr + batch * query_batch + token * query_token,
        dquery_ptr, query_weight_ptr, dquery_weight_ptr, query_grad_head, query_head, dquery_head,
        begin, tl.minimum(end, query_heads), valid, cos, sin, dcos, dsin, half, features, eps,
        dquery_ptr is not None, TABLES, INTERLEAVED, HALF, REST,
    )  # fmt: skip
    dcos, dsin = _pull_heads(
        key_grad_ptr + batch * key_grad_batch + token * key_grad_token,
        key_ptr + batch * key_batch + token * key_token,
        dkey_ptr, key_weight_ptr, dkey_weight_ptr, key_grad_head, key_head, dkey_head,
        tl.maximum(begin - query_heads, 0), tl.minimum(end - query_heads, key_heads),
        valid, cos, sin, dcos, dsin, half, features, eps,
        dkey_ptr is not None, TABLES, INTERLEAVED, HALF, REST,
    )  # fmt: skip
    i = tl.arange(0, HALF)[None, :]
    elements = tl.num_programs(0) // blocks
    there = ((tl.program_id(1) * elements + batch) * length + token) * half + i
    if dcos_ptr is not None:
        tl.store(dcos_ptr + there, dcos, mask=valid & (i < half))
    if dsin_ptr is not None:
        tl.store(dsin_ptr + there, dsin, mask=valid & (i < half))


# --- launches ---------------------------------------------------------------------------------------------------------


def _config(features: int, half: int, length: int) -> Config:
    """Tiles of 1024 elements, or one row: a thread has eight of each half, 16 bytes of a half-precision row."""
    rest = features - 2 * half
    constants = {"HALF": next_power_of_2(half), "REST": next_power_of_2(rest) if rest else 0}
    width = next_power_of_2(2 * constants["HALF"] + constants["REST"])
    tokens = min(max(1024 // width, 1), 64, next_power_of_2(length))
    return Config({"TOKENS": tokens, **constants}, num_warps=min(max(tokens * width // 512, 1), 16), num_stages=1)


def _span(programs: int, heads: int) -> int:
    """Heads per program: enough programs to fill a GPU twice, and a table that is read once for many heads."""
    return max(min(ceil_div(programs * heads, 2048), heads), 1)


def _rows(t: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and token."""
    if t is None:
        return 0, 0, 0
    return (t.stride(0), t.stride(1), t.stride(2)) if t.dim() == 4 else (0, t.stride(1), t.stride(0))


def _table_rows(t: Tensor) -> tuple[int, int]:
    return (t.stride(0) if t.dim() == 3 and t.shape[0] > 1 else 0), t.stride(-2)


def _sizes(a: Arguments) -> tuple[int, int, Config, int]:
    """Batch elements, blocks of tokens, configuration and heads per program."""
    packed = a.query.dim() == 3
    batch, length = (1, a.query.shape[0]) if packed else (a.query.shape[0], a.query.shape[2])
    config = _config(a.query.shape[-1], a.cos.shape[-1], length)
    blocks = ceil_div(length, config.constants["TOKENS"])
    return batch, blocks, config, _span(batch * blocks, a.query.shape[1] + a.key.shape[1])


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    query, key, cos, sin, query_weight, key_weight, eps, interleaved = a
    outs = empty_in_order_of(query, query.shape), empty_in_order_of(key, key.shape)
    batch, blocks, config, span = _sizes(a)
    heads, features = query.shape[1] + key.shape[1], query.shape[-1]
    launch(
        _forward,
        (batch * blocks if features else 0, ceil_div(heads, span)),
        *(query, key, cos, sin, query_weight, key_weight, *outs),
        *(query.shape[0 if query.dim() == 3 else 2], query.shape[1], key.shape[1], features, cos.shape[-1], span),
        *(s for t in (query, key, *outs) for s in _rows(t)),
        *(*_table_rows(cos), *_table_rows(sin)),
        eps,
        INTERLEAVED=interleaved,
        config=config,
    )
    return outs


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    query, key, cos, sin, query_weight, key_weight, eps, interleaved = a
    batch, blocks, config, span = _sizes(a)
    heads, features, half = query.shape[1] + key.shape[1], query.shape[-1], cos.shape[-1]
    if query_weight is not None or key_weight is not None:  # their sums take registers too
        config = replace(config, num_warps=min(2 * config.num_warps, 16))
    length = query.shape[0 if query.dim() == 3 else 2]
    groups = ceil_div(heads, span)
    dx = [empty_in_order_of(x, x.shape) if n else None for x, n in zip((query, key), needed, strict=False)]

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return query.new_empty(shape, dtype=torch.float32) if wanted else None

    tables = [sums(n, groups, batch, length, half) for n in needed[2:4]]
    weights = [sums(n, groups * batch * blocks, features) for n in needed[4:]]
    launch(
        _backward,
        (batch * blocks if features else 0, groups),
        *(*grads, query, key, cos, sin, query_weight, key_weight, *dx, *tables, *weights),
        *(length, query.shape[1], key.shape[1], features, half, span),
        *(s for t in (*grads, query, key, *dx) for s in _rows(t)),
        *(*_table_rows(cos), *_table_rows(sin)),
        eps,
        INTERLEAVED=interleaved,
        config=config,
        enable_fp_fusion=False,
    )
    one_table = cos.dim() == 2 or cos.shape[0] == 1
    shared = (0, 1) if one_table else (0,)
    pulled = [
        *dx,
        *(None if t is None else t.sum(shared).view(cos.shape).to(cos.dtype) for t in tables),
        *(
            None if t is None or w is None else t.sum(0).to(w.dtype)
            for t, w in zip(weights, (query_weight, key_weight), strict=True)
        ),
    ]
    return [query.new_empty(0) if t is None else t for t in pulled]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FLUX, a language model with few heads of keys, heads of which a part is rotated."""
    import mmkernels as mmk

    def call(heads: int, key_heads: int, length: int, features: int, half: int, norm: bool, **options: Any) -> Any:
        query, key = (new(2, length, n, features).transpose(1, 2) for n in (heads, key_heads))
        cos, sin = (new(length, half, dtype=torch.float32) for _ in range(2))
        if 2 * half == features:
            cos, sin = cos.detach(), sin.detach()  # frequencies are learned in the last one alone
        weights: Any = {"query_weight": new(features), "key_weight": new(features)} if norm else {}
        return mmk.norm_rotary(query, key, cos, sin, **weights, **options)

    yield "24 heads of 4608x128, norms, neighbours", lambda: call(24, 24, 4608, 128, 64, True, interleaved=True)
    yield "32 and 8 heads of 1024x64", lambda: call(32, 8, 1024, 64, 32, False)
    yield "16 heads of 512x96, 64 rotated, norms", lambda: call(16, 16, 512, 96, 32, True)
