"""Registration of bilinear_fusion: schema, shapes of its outputs, backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.bilinear_fusion import reference


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    x_weight: Tensor
    y_weight: Tensor
    rank: int
    presence: Tensor | None


def _bilinear_fusion_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    x, _, x_weight, _, rank, _ = a
    batch, projections = x.shape[0], x_weight.shape[0]
    kept = (projections, batch)
    return x.new_empty((batch, projections // rank)), x.new_empty(kept), x.new_empty(kept)


bilinear_fusion_op = DifferentiableOp(
    "bilinear_fusion",
    Arguments,
    outputs="Tensor out",
    saved="Tensor x_projection, Tensor y_projection",
    reference=reference.bilinear_fusion,
    reference_saved=reference.projections,
    fake=_bilinear_fusion_fake,
    cpu=NativeKernels(weights=("x_weight", "y_weight")),
    triton=TritonKernels(),
    keeps=Kept(
        {
            "x": "x_weight y y_weight presence",
            "x_weight": "x y y_weight presence",
            "y": "x x_weight y_weight presence",
            "y_weight": "x x_weight y presence",
        }
    ),
)
