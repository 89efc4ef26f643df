"""modulated_norm on NVIDIA GPUs, in CUDA C++: csrc/modulated_norm/modulated_norm_cuda.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._cuda import Library, aligned
from mmkernels.ops._norm import NORMS
from mmkernels.ops.modulated_norm.op import Arguments

_FORWARD_TEAMS = 8192  # that no multiprocessor waits long for the last
_BACKWARD_TEAMS = 1056  # eight for each multiprocessor of a large GPU, and few sums to write and to add up


def _run(x: Tensor, teams: int) -> int:
    """Tokens per team."""
    batch, length, _ = x.shape
    return min(max(batch * length // teams, 1), 64)


def forward(kernels: Library, a: Arguments, training: bool) -> Tensor:
    x, shift, scale, norm, weight, bias, eps = a
    y = x.new_empty(x.shape)
    if x.numel():
        kernels("modulated_norm_fwd", x, shift, scale, weight, bias, NORMS.index(norm), eps, _run(x, _FORWARD_TEAMS), y)
    return y


def backward(
    kernels: Library, grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor]:
    x, shift, scale, norm, weight, bias, eps = a
    batch, length, features = x.shape
    run = _run(x, _BACKWARD_TEAMS)
    per_token = shift.shape[1] != 1
    runs = -(-length // run)

    def fresh(index: int, shared: bool) -> Tensor | None:
        """Where the gradient of an argument goes, or its sum over each run."""
        if not needed[index]:
            return None
        return x.new_empty((batch, runs, features), dtype=torch.float32) if shared else x.new_empty(x.shape)

    dx, dshift, dscale = fresh(0, False), fresh(1, not per_token), fresh(2, not per_token)
    dweight, dbias = fresh(3, True), fresh(4, True)
    if x.numel():
        outputs = (dx, dshift, dscale, dweight, dbias)
        arguments = (x, shift, scale, weight, bias, NORMS.index(norm), eps, run)
        kernels("modulated_norm_bwd", aligned(grads[0]), *arguments, *outputs)
    if not per_token:
        dshift, dscale = (None if t is None else t.sum(1, keepdim=True).to(x.dtype) for t in (dshift, dscale))
    dweight, dbias = (None if t is None else t.sum((0, 1)).to(x.dtype) for t in (dweight, dbias))
    return [x.new_empty(0) if t is None else t for t in (dx, dshift, dscale, dweight, dbias)]
