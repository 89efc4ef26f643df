"""Registration of concat_linear: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmkernels._cuda import misaligned, products_lose
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops.concat_linear import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    presence: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None


def keeps_output(a: Arguments) -> bool:
    """Whether the activation's derivative follows from the output, which then serves in place of z."""
    return a.activation in ("relu", "tanh", "sigmoid") and a.residual is None and a.gate is None


def needs_preactivation(a: Arguments) -> bool:
    return (a.activation is not None or a.gate is not None) and not keeps_output(a)


_KEPT = (
    Kept({"xs": "xs weight presence", "weight": "xs presence", "bias": "", "residual": ""}, added="residual"),  # no act
    Kept({"residual": ""}, never="residual", added="residual"),
    Kept({"residual": ""}, never="residual", outputs=True),
)


def _kept_kind(a: Arguments) -> int:
    return 2 if keeps_output(a) else int(needs_preactivation(a))


def _concat_linear_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    out = a.xs[0].new_empty((*a.xs[0].shape[:-1], a.weight.shape[0]))
    return out, out.new_empty(out.shape if needs_preactivation(a) else 0)


def _concat_linear_saved(*fields: Any) -> tuple[Tensor]:
    a = Arguments(*fields)
    if not needs_preactivation(a):
        return (a.weight.new_empty(0),)
    return (reference.projection(a.xs, a.weight, a.bias, a.presence).contiguous(),)


MOST_SOURCES = 16  # of the CUDA kernels


def cuda_declines_sizes(xs: Sequence[Tensor], weight: Tensor) -> str | None:
    """Why the CUDA kernels cannot take so many sources of such widths, or so many features, or None."""
    if len(xs) > MOST_SOURCES:
        return f"{len(xs)} sources: its kernel takes up to {MOST_SOURCES}"
    for what, size in (*((f"xs[{i}]'s width", x.shape[-1]) for i, x in enumerate(xs)), ("N", weight.shape[0])):
        if size % 8:
            return f"{what} is {size}: its kernel takes multiples of 8"
    return None


def _cuda_supports(a: Arguments) -> str | None:
    gate = None if a.gate is None or a.gate.dim() == 0 else a.gate
    return cuda_declines_sizes(a.xs, a.weight) or misaligned(*a.xs, a.weight, a.bias, a.residual, gate)


def _cuda_loses(a: Arguments) -> str | None:
    return products_lose(a.xs[0].shape[:-1].numel(), a.weight.shape[0], a.weight)


concat_linear_op = DifferentiableOp(
    "concat_linear",
    Arguments,
    outputs="Tensor out",
    saved="Tensor preactivation",  # z; empty where the backward needs none of it
    reference=reference.concat_linear,
    reference_saved=_concat_linear_saved,
    fake=_concat_linear_fake,
    cpu=NativeKernels(weights=("weight",)),
    cuda=CudaKernels(_cuda_supports, loses=_cuda_loses),
    triton=TritonKernels(),
    keeps=(_KEPT, _kept_kind),
)
