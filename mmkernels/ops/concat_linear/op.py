"""Registration of concat_linear: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmkernels._cuda import misaligned, products_lose
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops.concat_linear import reference


def keeps_output(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    presence: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> bool:
    """Whether the activation's derivative follows from the output, which then serves in place of z."""
    return activation in ("relu", "tanh", "sigmoid") and residual is None and gate is None


def needs_preactivation(*args: Any) -> bool:
    _, _, _, activation, _, _, gate = args
    return (activation is not None or gate is not None) and not keeps_output(*args)


_KEPT = (
    Kept({"xs": "xs weight presence", "weight": "xs presence", "bias": "", "residual": ""}),  # the product alone
    Kept({"residual": ""}, never="residual"),
    Kept({"residual": ""}, never="residual", outputs=True),
)


def _kept_kind(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, *options: Any) -> int:
    if keeps_output(xs, weight, bias, *options):
        return 2
    return int(needs_preactivation(xs, weight, bias, *options))


def _concat_linear_fake(xs: Sequence[Tensor], weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = xs[0].new_empty((*xs[0].shape[:-1], weight.shape[0]))
    return out, out.new_empty(out.shape if needs_preactivation(xs, weight, *rest) else 0)


def _concat_linear_saved(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor]:
    if not needs_preactivation(xs, weight, bias, *rest):
        return (xs[0].new_empty(0),)
    _, presence, _, _ = rest
    return (reference.projection(xs, weight, bias, presence).contiguous(),)


MOST_SOURCES = 16  # of the CUDA kernels


def cuda_declines_sizes(xs: Sequence[Tensor], weight: Tensor) -> str | None:
    """Why the CUDA kernels cannot take so many sources of such widths, or so many features, or None."""
    if len(xs) > MOST_SOURCES:
        return f"{len(xs)} sources: its kernel takes up to {MOST_SOURCES}"
    for what, size in (*((f"xs[{i}]'s width", x.shape[-1]) for i, x in enumerate(xs)), ("N", weight.shape[0])):
        if size % 8:
            return f"{what} is {size}: its kernel takes multiples of 8"
    return None


def _cuda_supports(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    presence: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> str | None:
    vector = None if gate is None or gate.dim() == 0 else gate
    return cuda_declines_sizes(xs, weight) or misaligned(*xs, weight, bias, residual, vector)


def cuda_loses(xs: Sequence[Tensor], weight: Tensor, *_: Any) -> str | None:
    return products_lose(xs[0].shape[:-1].numel(), weight.shape[0], weight)


concat_linear_op = DifferentiableOp(
    "concat_linear",
    "Tensor[] xs, Tensor weight, Tensor? bias, str? activation, Tensor? presence, Tensor? residual, Tensor? gate",
    outputs="Tensor out",
    saved="Tensor preactivation",  # z; empty where the backward needs none of it
    reference=reference.concat_linear,
    reference_saved=_concat_linear_saved,
    fake=_concat_linear_fake,
    cpu=NativeKernels("concat_linear", weights=("weight",)),
    cuda=CudaKernels(_cuda_supports, loses=cuda_loses),
    triton=TritonKernels(),
    keeps=(_KEPT, _kept_kind),
)
