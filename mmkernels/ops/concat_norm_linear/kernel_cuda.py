"""concat_norm_linear on NVIDIA GPUs, in CUDA C++: csrc/concat_norm_linear/concat_norm_linear_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library
from mmkernels.ops._rows import as_rows
from mmkernels.ops.concat_linear.kernel_cuda import activation_number, preactivation_gradients, rows_of_run, tile
from mmkernels.ops.concat_norm_linear.op import Arguments


def forward(kernels: Library, a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    xs, norm_weight, norm_bias, weight, bias, norm, eps, activation = a
    features = weight.shape[0]
    y = weight.new_empty((*xs[0].shape[:-1], features))
    keeps = training and activation is not None
    z = y.new_empty(y.shape if keeps else 0)
    sources = [as_rows(x) for x in xs]
    rows = sources[0].shape[0]
    statistics = y.new_empty((rows, 2), dtype=torch.float32)
    if rows:
        kernels(
            "concat_norm_linear_fwd",
            *(weight, sources, norm_weight, norm_bias, bias, norm == "layer", eps, activation_number(activation)),
            *(tile(rows, features), statistics, z if keeps else None, y),
        )
    return y, z, statistics if training else statistics.new_empty(0)


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    xs, norm_weight, norm_bias, weight, _, norm, _, activation = a
    count = len(xs)
    of_xs, (of_norm_weight, of_norm_bias, of_weight, of_bias) = needed[:count], needed[count:]
    *kept, statistics = saved  # kept: the output and nothing without an activation, else z
    statistics = statistics.contiguous()
    wants_da = any(of_xs) or of_norm_weight or of_norm_bias
    z = None if activation is None else kept[0]
    dz, dbias, _ = preactivation_gradients(
        kernels, as_rows(grads[0]), z, None, activation, False, wants_da or of_weight, of_bias, False
    )
    sources = [as_rows(x) for x in xs]
    rows, width = dz.shape[0], weight.shape[1]
    run = rows_of_run(rows, width)
    da = dz @ weight if wants_da else None
    means = statistics.new_empty((rows, 2)) if any(of_xs) else None
    n = weight.new_empty((rows, width)) if of_weight else None
    dnorm_weight, dnorm_bias = (
        statistics.new_empty((-(-rows // run), width)) if wanted else None for wanted in (of_norm_weight, of_norm_bias)
    )
    dxs = [x.new_empty(x.shape if of_x else 0) for x, of_x in zip(xs, of_xs, strict=True)]
    if rows and width:
        if da is not None and means is not None:
            kernels("concat_norm_linear_means", da, sources, norm_weight, norm == "layer", statistics, means)
        if da is not None or n is not None:
            kernels(
                "concat_norm_linear_grads",
                *(norm_weight, sources, norm_bias, da, statistics, means, run, dxs),
                *(n, dnorm_weight, dnorm_bias),
            )
    dweight = None if n is None else dz.t() @ n
    sums = (None if t is None else t.sum(0).to(weight.dtype) for t in (dnorm_weight, dnorm_bias))
    return [weight.new_empty(0) if g is None else g for g in (*dxs, *sums, dweight, dbias)]
