"""Registration of bilinear_fusion: schema, shapes of its outputs, backends."""

from __future__ import annotations

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.bilinear_fusion import reference


def _bilinear_fusion_fake(
    x: Tensor, y: Tensor, x_weight: Tensor, y_weight: Tensor, rank: int, presence: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, projections = x.shape[0], x_weight.shape[0]
    kept = (projections, batch)
    return x.new_empty((batch, projections // rank)), x.new_empty(kept), x.new_empty(kept)


bilinear_fusion_op = DifferentiableOp(
    "bilinear_fusion",
    "Tensor x, Tensor y, Tensor x_weight, Tensor y_weight, int rank, Tensor? presence",
    outputs="Tensor out",
    saved="Tensor x_projection, Tensor y_projection",
    reference=reference.bilinear_fusion,
    reference_saved=reference.projections,
    fake=_bilinear_fusion_fake,
    cpu=NativeKernels("bilinear_fusion", weights=("x_weight", "y_weight")),
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
