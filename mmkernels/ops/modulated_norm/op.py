"""Registration of modulated_norm and its backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels._cuda import misaligned, rows_lose
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, TritonKernels
from mmkernels.ops.modulated_norm import reference


class Arguments(NamedTuple):
    x: Tensor
    shift: Tensor
    scale: Tensor
    norm: str | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float


def _modulated_norm_fake(a: Arguments) -> tuple[Tensor]:
    x = a.x
    return (x.new_empty(x.shape),)


def _cuda_supports(a: Arguments) -> str | None:
    x, shift, scale, _, weight, bias, _ = a
    features = x.shape[2]
    if features % 8 or features > 4096:
        return f"{features} features: its kernel takes multiples of 8 up to 4096"
    return misaligned(x, shift, scale, weight, bias)


def _triton_supports(a: Arguments) -> str | None:
    x = a.x
    return None if x.shape[2] <= 4096 else f"{x.shape[2]} features are more than the 4096 that a program holds"


_KEPT = (
    Kept({"x": "scale", "shift": "", "scale": "x"}),  # without a norm
    Kept(
        {
            "x": "x scale norm_weight",
            "shift": "",
            "scale": "x norm_weight norm_bias",
            "norm_weight": "x scale",
            "norm_bias": "scale",
        }
    ),
)

modulated_norm_op = DifferentiableOp(
    "modulated_norm",
    Arguments,
    outputs="Tensor out",
    reference=reference.modulated_norm,
    fake=_modulated_norm_fake,
    cuda=CudaKernels(_cuda_supports, loses=lambda a: rows_lose(a.x.numel())),
    triton=TritonKernels(_triton_supports),
    keeps=(_KEPT, lambda a: a.norm is not None),
)
