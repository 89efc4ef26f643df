"""merge_embeddings on GPUs.

    out[b, l] = modal[t] where mask[b, l] is the t-th True in row-major order, else text[b, l]

Tiling     which row goes where is a prefix sum of the mask, on the device. A program owns tokens and features and
           copies each from where it comes from; the backward copies the same way back, so that nothing is added.
Precision  a copy, bit for bit.
Limits     none. The host waits for nothing; a count that does not fit is found by ``check`` alone, and a token for
           which there is no row keeps its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.merge_embeddings.op import Arguments
from mmkernels.ops.merge_embeddings.reference import check_count
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2, odd
from mmkernels.triton.math import number


@triton.jit
def _rows(masks, counts, token, tokens):
    """Whether each token is replaced, and by which row."""
    inside = token < tokens
    replaced = inside & (tl.load(masks + token, mask=inside, other=0) != 0)
    return inside, replaced, tl.load(counts + token, mask=inside, other=0) - 1


@triton.jit(do_not_specialize=["tokens", "length"])
def _forward(
    text,  # [B, L, C]
    modals,  # sources, each [T, C]
    counts,  # [B·L] int64, how many True there are up to and with each token
    masks,  # [B·L] bool
    out,  # [B, L, C]
    tokens,  # B·L
    length,  # L
    features,
    text_batch,  # strides
    text_token,
    modal_strides,
    modal_rows,  # T of each, odd
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_C)
    token = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, replaced, row = _rows(masks, counts, token, tokens)
    kept = inside
    columns_inside = (c < features)[None, :]
    at = token[:, None] * features + c[None, :]
    for i in tl.static_range(len(modals)):
        rows = number(modal_rows[i])
        here = replaced & (row >= 0) & (row < rows)
        kept = kept & (here == 0)
        x = tl.load(modals[i] + row[:, None] * modal_strides[i] + c[None, :], mask=here[:, None] & columns_inside)
        tl.store(out + at, x, mask=here[:, None] & columns_inside)
        row -= rows
    text_at = token // length * text_batch + token % length * text_token
    x = tl.load(text + text_at[:, None] + c[None, :], mask=kept[:, None] & columns_inside)
    tl.store(out + at, x, mask=kept[:, None] & columns_inside)


@triton.jit(do_not_specialize=["tokens", "length"])
def _backward(
    grad,  # [B, L, C]
    counts,
    masks,
    dtext,  # [B, L, C] or None
    dmodals,  # each [T, C], of zeros, or anything where not wanted
    wanted,  # 1 or 0 of each, odd
    tokens,
    length,
    features,
    grad_batch,
    grad_token,
    modal_rows,  # odd
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.cdiv(features, BLOCK_C)
    token = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, replaced, row = _rows(masks, counts, token, tokens)
    columns_inside = (c < features)[None, :]
    grad_at = token // length * grad_batch + token % length * grad_token
    g = tl.load(grad + grad_at[:, None] + c[None, :], mask=inside[:, None] & columns_inside, other=0.0)
    if dtext is not None:
        at = token[:, None] * features + c[None, :]
        of_text = tl.where(replaced[:, None], 0.0, g.to(tl.float32)).to(g.dtype)
        tl.store(dtext + at, of_text, mask=inside[:, None] & columns_inside)
    for i in tl.static_range(len(dmodals)):
        rows = number(modal_rows[i])
        here = replaced & (row >= 0) & (row < rows) & (number(wanted[i]) == 1)
        tl.store(dmodals[i] + row[:, None] * features + c[None, :], g, mask=here[:, None] & columns_inside)
        row -= rows


def _config(features: int, itemsize: int) -> Config:
    """4096 elements of 256 threads, accesses of 16 bytes: whole rows of up to 2048 half-precision features."""
    block = min(max(next_power_of_2(features), 16), 4096 // itemsize)
    return Config({"BLOCK_M": max(4096 // block, 1), "BLOCK_C": block}, num_warps=8, num_stages=1)


def _grid(config: Config, tokens: int, features: int) -> tuple[int]:
    return (ceil_div(tokens, config.constants["BLOCK_M"]) * ceil_div(features, config.constants["BLOCK_C"]),)


def _counts(mask: Tensor) -> tuple[Tensor, Tensor]:
    flat = mask.reshape(-1)
    return flat.cumsum(0), flat


def forward(a: Arguments, training: bool) -> Tensor:
    text, modals, mask, check = a
    if check:
        check_count(sum(m.shape[0] for m in modals), mask)
    out = text.new_empty(text.shape)
    batch, length, features = text.shape
    config = _config(features, text.element_size())
    launch(
        _forward,
        _grid(config, batch * length, features),
        *(text, tuple(modals), *_counts(mask), out),
        *(batch * length, length, features, *text.stride()[:2]),
        *(tuple(m.stride(0) for m in modals), odd([m.shape[0] for m in modals])),
        config=config,
    )
    return out


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    text, modals, mask, _ = a
    (grad,) = grads
    batch, length, features = text.shape
    of_text, *of_modals = needed[: 1 + len(modals)]
    dtext = text.new_empty(text.shape) if of_text else None
    dmodals = [m.new_zeros(m.shape if n else 0) for m, n in zip(modals, of_modals, strict=True)]
    config = _config(features, text.element_size())
    launch(
        _backward,
        _grid(config, batch * length, features),
        *(grad, *_counts(mask), dtext, tuple(dmodals), odd(of_modals)),
        *(batch * length, length, features, *grad.stride()[:2], odd([m.shape[0] for m in modals])),
        config=config,
    )
    return [text.new_empty(0) if dtext is None else dtext, *dmodals, text.new_empty(0)]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call for a row in several blocks, and one for rows that share a block."""
    import mmkernels as mmk

    def call(batch: int, length: int, features: int, rows: int) -> Any:
        mask = new(batch, length, dtype=torch.bool)
        return mmk.merge_embeddings(new(batch, length, features), new(rows, features), mask)

    yield "8x4096x4096, 2880 inserted", lambda: call(8, 4096, 4096, 2880)
    yield "8x128x960, 64 inserted", lambda: call(8, 128, 960, 64)
