"""merge_attention on GPUs.

    w_i = exp(lse_i − lse),   lse = log Σ_i exp lse_i,   out = Σ_i w_i out_i
    d out_i = w_i g,   d lse_i = w_i (g · out_i − Σ_j w_j g · out_j + d lse)

Tiling     a program owns ROWS rows: the lses of all parts and one part's tile [ROWS, D] are in registers, and each
           element of a part is read once and written once, in the backward too.
Precision  float32; weights from the largest lse, not from the sum, whose rounding would enter them at large logits.
Limits     D up to 8192, up to 64 parts. A part that attends to nothing, lse_i = −inf, is not read. Parts that do not
           lie in memory as the first one does are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.merge_attention.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2

# Rows have up to three dims. The strides of lses depend on the length; those of outputs are multiples of D.
_UNSPECIALIZED = ["rows", "n1", "n2"] + [f"{name}_{i}" for name in ("lses", "lse", "glse", "dlses") for i in range(3)]


@triton.jit
def _offset(row, n1, n2, stride_0, stride_1, stride_2):
    """Where rows [ROWS] of a tensor [n0, n1, n2, ...] begin."""
    i2 = (row % n2).to(tl.int64)
    i1 = ((row // n2) % n1).to(tl.int64)
    i0 = (row // n2 // n1).to(tl.int64)
    return i0 * stride_0 + i1 * stride_1 + i2 * stride_2


@triton.jit
def _weights(lse_ptrs, offset, valid):
    """The parts' weights, a tuple of [ROWS], 0 where no part attends to anything; and the lse."""
    weights = tl.tuple(())
    top = offset * 0.0 - float("inf")
    for i in tl.static_range(len(lse_ptrs)):
        lse = tl.load(lse_ptrs[i] + offset, mask=valid, other=float("-inf"))
        weights += (lse,)
        top = tl.maximum(top, lse)
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    total = top * 0.0
    shares = tl.tuple(())
    for i in tl.static_range(len(lse_ptrs)):
        share = tl.exp(weights[i] - top)
        total += share
        shares += (share,)
    total = tl.where(empty, 1.0, total)
    weights = tl.tuple(())
    for i in tl.static_range(len(lse_ptrs)):
        weights += (shares[i] / total,)
    return weights, tl.where(empty, float("-inf"), tl.log(total) + top)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(
    output_ptrs,  # M of [n0, n1, n2, D]
    lse_ptrs,  # M of [n0, n1, n2]
    out_ptr,  # [n0, n1, n2, D]
    lse_ptr,  # [n0, n1, n2]
    rows,  # n0 · n1 · n2
    n1,
    n2,
    features,  # D
    outputs_0,  # strides
    outputs_1,
    outputs_2,
    out_0,
    out_1,
    out_2,
    lses_0,
    lses_1,
    lses_2,
    lse_0,
    lse_1,
    lse_2,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # features in registers, a power of two
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    d = tl.arange(0, BLOCK)
    inside = valid[:, None] & (d < features)[None, :]
    weights, lse = _weights(lse_ptrs, _offset(row, n1, n2, lses_0, lses_1, lses_2), valid)
    tl.store(lse_ptr + _offset(row, n1, n2, lse_0, lse_1, lse_2), lse, mask=valid)
    here = _offset(row, n1, n2, outputs_0, outputs_1, outputs_2)[:, None] + d[None, :]
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(len(output_ptrs)):
        weight = weights[i][:, None]
        x = tl.load(output_ptrs[i] + here, mask=inside & (weight != 0.0), other=0.0)
        out += weight * x.to(tl.float32)
    there = _offset(row, n1, n2, out_0, out_1, out_2)[:, None] + d[None, :]
    tl.store(out_ptr + there, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward(
    g_ptr,  # [n0, n1, n2, D]
    glse_ptr,  # [n0, n1, n2]
    output_ptrs,  # M of [n0, n1, n2, D]
    lse_ptrs,  # M of [n0, n1, n2]
    doutput_ptrs,  # M of [n0, n1, n2, D] or None
    dlse_ptrs,  # M of [n0, n1, n2] or None
    rows,
    n1,
    n2,
    features,
    outputs_0,
    outputs_1,
    outputs_2,
    g_0,
    g_1,
    g_2,
    doutputs_0,
    doutputs_1,
    doutputs_2,
    lses_0,
    lses_1,
    lses_2,
    glse_0,
    glse_1,
    glse_2,
    dlses_0,
    dlses_1,
    dlses_2,
    LSES: tl.constexpr,  # whether any gradient of an lse is wanted
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    d = tl.arange(0, BLOCK)
    inside = valid[:, None] & (d < features)[None, :]
    weights, lse = _weights(lse_ptrs, _offset(row, n1, n2, lses_0, lses_1, lses_2), valid)
    g = tl.load(g_ptr + _offset(row, n1, n2, g_0, g_1, g_2)[:, None] + d[None, :], mask=inside, other=0.0)
    g = g.to(tl.float32)
    here = _offset(row, n1, n2, outputs_0, outputs_1, outputs_2)[:, None] + d[None, :]
    there = _offset(row, n1, n2, doutputs_0, doutputs_1, doutputs_2)[:, None] + d[None, :]
    dots = tl.tuple(())
    mean = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(output_ptrs)):
        seen = (weights[i] != 0.0)[:, None]
        if doutput_ptrs[i] is not None:
            dx = tl.where(seen, weights[i][:, None] * g, 0.0)
            tl.store(doutput_ptrs[i] + there, dx.to(g_ptr.dtype.element_ty), mask=inside)
        if LSES:
            x = tl.load(output_ptrs[i] + here, mask=inside & seen, other=0.0).to(tl.float32)
            dot = tl.sum(g * x, 1)
            mean += weights[i] * dot
            dots += (dot,)
    if LSES:
        glse = tl.load(glse_ptr + _offset(row, n1, n2, glse_0, glse_1, glse_2), mask=valid, other=0.0)
        there_lse = _offset(row, n1, n2, dlses_0, dlses_1, dlses_2)
        for i in tl.static_range(len(output_ptrs)):
            if dlse_ptrs[i] is not None:
                dlse = tl.where(weights[i] != 0.0, weights[i] * (dots[i] - mean + glse), 0.0)
                tl.store(dlse_ptrs[i] + there_lse, dlse, mask=valid)


def _config(features: int) -> Config:
    """Sixteen elements per thread of every tile, two 16-byte accesses of a half-precision row; a bandwidth-bound kernel
    wants many small programs rather than large ones. Rows beyond 2048 features take more warps."""
    block = next_power_of_2(features)
    return Config(
        {"ROWS": max(2048 // block, 1), "BLOCK": block}, num_warps=min(max(block // 512, 4), 16), num_stages=1
    )


# --- how rows lie in memory -------------------------------------------------------------------------------------------

Strides = tuple[int, ...]


def _merged_dims(first: Tensor, shape: Strides, strides: Sequence[Strides]) -> tuple[Strides, list[Strides]] | None:
    """Leading dims in the memory order of ``first``, those merged that all ``strides`` allow to be; None where more
    than three are left."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim in sorted(range(len(shape)), key=first.stride, reverse=True):
        if shape[dim] == 1:
            continue
        if sizes and all(m[-1] == s[dim] * shape[dim] for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= shape[dim]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[dim]
        else:
            sizes.append(shape[dim])
            for m, s in zip(merged, strides, strict=True):
                m.append(s[dim])
    lacking = 3 - len(sizes)
    if lacking < 0:
        return None
    return (*[1] * lacking, *sizes), [(*[0] * lacking, *m) for m in merged]


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with the strides of one another: as they are, or copies in the memory order of the first."""
    first = tensors[0]
    if all(t.stride() == first.stride() for t in tensors):
        return list(tensors)
    dense = empty_in_order_of(first, first.shape)
    return [t if t.stride() == dense.stride() else torch.empty_like(dense).copy_(t) for t in tensors]


def _in_own_order(tensor: Tensor) -> Tensor:
    return empty_in_order_of(tensor, tensor.shape)


def _launch_rows(
    kernel: Any, tensors: Sequence[Any], matrices: Sequence[Tensor], vectors: Sequence[Tensor], **constants: Any
) -> bool:
    """Run a kernel on ``tensors``; the strides of rows of ``matrices`` [*, D] and ``vectors`` [*] follow in order.
    False where rows have more than three dims."""
    first = matrices[0]
    if first.shape[:-1].numel() == 0:
        return True
    lead = first.dim() - 1
    strides = [t.stride()[:lead] for t in (*matrices, *vectors)]
    merged = _merged_dims(first, first.shape[:-1], strides)
    if merged is None:
        return False
    (_, n1, n2), row_strides = merged
    features, rows = first.shape[-1], first.shape[:-1].numel()
    config = _config(features)
    launch(
        kernel,
        (ceil_div(rows, config.constants["ROWS"]),),
        *tensors,
        *(rows, n1, n2, features),
        *(s for strides in row_strides for s in strides),
        config=config,
        **constants,
    )
    return True


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    outputs, lses = a
    out, lse = _in_own_order(outputs[0]), _in_own_order(lses[0])
    outputs, lses = _alike(outputs), _alike(lses)
    if _launch_rows(_forward, (tuple(outputs), tuple(lses), out, lse), (outputs[0], out), (lses[0], lse)):
        return out, lse
    plain = forward(Arguments([x.contiguous() for x in outputs], [x.contiguous() for x in lses]), training)
    return out.copy_(plain[0]), lse.copy_(plain[1])


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    outputs, lses = a
    g, glse = grads
    parts = len(outputs)
    results = [_in_own_order(x) if n else None for x, n in zip((*outputs, *lses), needed, strict=True)]
    outputs, lses = _alike(outputs), _alike(lses)
    common = [_in_own_order(x) for x in (outputs[0], lses[0])]
    written = [
        None if x is None else x if x.stride() == c.stride() else torch.empty_like(c)
        for x, c in zip(results, [common[0]] * parts + [common[1]] * parts, strict=True)
    ]
    tensors = (g, glse, tuple(outputs), tuple(lses), tuple(written[:parts]), tuple(written[parts:]))
    matrices, vectors = (outputs[0], g, common[0]), (lses[0], glse, common[1])
    if not _launch_rows(_backward, tensors, matrices, vectors, LSES=any(needed[parts:])):
        dense_grads, dense_outputs, dense_lses = ([x.contiguous() for x in group] for group in (grads, outputs, lses))
        plain = backward(dense_grads, Arguments(dense_outputs, dense_lses), saved, needed)
        written = [x if n else None for x, n in zip(plain, needed, strict=True)]
    for result, value in zip(results, written, strict=True):
        if result is not None and value is not None and result is not value:
            result.copy_(value)
    return [g.new_empty(0) if x is None else x for x in results]


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Heads of 64 and 128 features, as attention returns them and transposed, and a whole model dim."""
    import mmkernels as mmk

    def call(parts: int, transposed: bool, *shape: int) -> Callable[[], Any]:
        stored = (shape[0], shape[2], shape[1], shape[3]) if transposed else shape
        outputs = [new(*stored) for _ in range(parts)]
        lses = [new(*shape[:3], dtype=torch.float32) for _ in range(parts)]
        return lambda: mmk.merge_attention([x.transpose(1, 2) if transposed else x for x in outputs], lses)

    yield "2 parts 8x16x4096x64", call(2, False, 8, 16, 4096, 64)
    yield "3 parts 2x24x4096x128, heads inside", call(3, True, 2, 24, 4096, 128)
    yield "2 parts 8x1x512x4096", call(2, False, 8, 1, 512, 4096)
