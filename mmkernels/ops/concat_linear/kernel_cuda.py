"""concat_linear on NVIDIA GPUs, in CUDA C++: csrc/concat_linear/concat_linear_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library, aligned
from mmkernels.ops._fusion_checks import ACTIVATIONS
from mmkernels.ops._rows import as_rows
from mmkernels.ops.concat_linear.op import Arguments, keeps_output, needs_preactivation

_BLOCKS = 264  # two for each multiprocessor of a large GPU
_STEP = 32  # rows that dW adds at a time, as kDepth of product_cuda.cuh


def activation_number(activation: str | None) -> int:
    """Its number among those of csrc/cpu/activation_kind.h."""
    return 0 if activation is None else 1 + ACTIVATIONS.index(activation)


def tile(rows: int, columns: int) -> int:
    """The side of a block's tile of a [rows, columns] product: 128 where there are enough of them, else 64."""
    return 128 if -(-rows // 128) * -(-columns // 128) >= _BLOCKS // 2 else 64


def rows_of_run(rows: int, features: int) -> int:
    """Of the passes of column_sums.cuh: few runs for torch to add up, and enough blocks of 64 features and a run."""
    return 32 * min(max(rows * features // (32 * 64 * 4096), 1), 16)


def _flags(presence: Tensor | None) -> Tensor | None:
    """Presence as [rows or 1, M]."""
    if presence is None:
        return None
    return presence[None] if presence.dim() == 1 else presence.reshape(-1, presence.shape[-1])


def forward(kernels: Library, a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    xs, weight, bias, activation, presence, residual, gate = a
    features = weight.shape[0]
    y = weight.new_empty((*xs[0].shape[:-1], features))
    keeps = training and needs_preactivation(a)
    z = y.new_empty(y.shape if keeps else 0)
    sources = [as_rows(x) for x in xs]
    if y.numel():
        rows = sources[0].shape[0]
        kernels(
            "concat_linear_fwd",
            *(weight, sources, bias, activation_number(activation), _flags(presence)),
            *(None if residual is None else as_rows(residual), gate, tile(rows, features), z if keeps else None, y),
        )
    return y, z


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    xs, weight, _, activation, presence, _, gate = a
    count = len(xs)
    of_xs, (of_weight, of_bias, _, of_residual, of_gate) = needed[:count], needed[count:]
    kept = None if activation is None and gate is None else saved[0]
    from_output = keeps_output(a)
    wants_dz = any(of_xs) or of_weight
    dz, dbias, dgate = preactivation_gradients(
        kernels, as_rows(grads[0]), kept, gate, activation, from_output, wants_dz, of_bias, of_gate
    )
    flags = _flags(presence)
    dweight = weight.new_empty(weight.shape) if of_weight else None
    dxs, column = [], 0
    for i, (x, of_x) in enumerate(zip(xs, of_xs, strict=True)):
        columns = slice(column, column + x.shape[-1])
        column = columns.stop
        dxs.append(_dx(kernels, dz, weight[:, columns], flags, i, x) if of_x else weight.new_empty(0))
        if dweight is not None:
            _fill_dweight(kernels, dz, as_rows(x), flags, i, dweight[:, columns])
    dresidual = grads[0].clone(memory_format=torch.contiguous_format) if of_residual else None
    rest = (dweight, dbias, None, dresidual, dgate)
    return [*dxs, *(weight.new_empty(0) if g is None else g for g in rest)]


def preactivation_gradients(
    kernels: Library,
    dy: Tensor,  # [rows, N]
    kept: Tensor | None,  # z, or the output where from_output
    gate: Tensor | None,
    activation: str | None,
    from_output: bool,
    of_products: bool,
    of_bias: bool,
    of_gate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, and the gradients of bias and gate; dz is dy where that is the same or nothing needs it."""
    rows, features = dy.shape
    dy = aligned(dy)
    run = rows_of_run(rows, features)
    plain = activation is None and gate is None
    dz = dy if plain or not of_products else dy.new_empty((rows, features))
    dbias, dgate = (
        dy.new_empty((-(-rows // run), features), dtype=torch.float32) if wanted else None
        for wanted in (of_bias, of_gate)
    )
    if dy.numel() and (dbias is not None or dgate is not None or dz is not dy):
        arguments = (dy, None if kept is None else aligned(kept), gate, activation_number(activation), from_output, run)
        kernels("concat_linear_dz", *arguments, None if dz is dy else dz, dbias, dgate)
    if dbias is not None:
        dbias = dbias.sum(0).to(dy.dtype)
    if dgate is not None and gate is not None:
        dgate = (dgate.sum() if gate.dim() == 0 else dgate.sum(0)).to(dy.dtype)
    return dz, dbias, dgate


def _dx(kernels: Library, dz: Tensor, weight: Tensor, flags: Tensor | None, source: int, x: Tensor) -> Tensor:
    """The gradient of a source, from its columns of the weight."""
    rows, width = dz.shape[0], weight.shape[1]
    dx = x.new_empty(x.shape)
    if flags is None:
        torch.mm(dz, weight, out=dx.view(rows, width))
    elif dx.numel():
        kernels("concat_linear_dx", dz, weight, flags, source, tile(rows, width), dx)
    return dx


def _fill_dweight(kernels: Library, dz: Tensor, x: Tensor, flags: Tensor | None, source: int, dweight: Tensor) -> None:
    """Write the gradient of a source's columns of the weight."""
    (rows, width), features = x.shape, dz.shape[1]
    if flags is None:
        torch.mm(dz.t(), x, out=dweight)
        return
    if not dweight.numel():
        return
    side = tile(features, width)
    tiles = -(-features // side) * -(-width // side)
    shares = max(min(_BLOCKS // tiles, -(-rows // (8 * _STEP))), 1)
    share = max(-(-rows // (shares * _STEP)) * _STEP, _STEP)
    shares = max(-(-rows // share), 1)
    into = dweight if shares == 1 else x.new_empty((shares, features, width), dtype=torch.float32)
    kernels("concat_linear_dw", dz, x, flags, source, side, share, into)
    if into is not dweight:
        dweight.copy_(into.sum(0))
