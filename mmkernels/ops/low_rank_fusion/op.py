"""Registration of low_rank_fusion: schema, shape of its output, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.low_rank_fusion import reference


class Arguments(NamedTuple):
    xs: Sequence[Tensor]
    factors: Sequence[Tensor]
    rank_weights: Tensor
    bias: Tensor | None
    presence: Tensor | None


def _low_rank_fusion_fake(a: Arguments) -> tuple[Tensor]:
    xs, factors = a.xs, a.factors
    return (xs[0].new_empty((xs[0].shape[0], factors[0].shape[2])),)


low_rank_fusion_op = DifferentiableOp(
    "low_rank_fusion",
    Arguments,
    outputs="Tensor out",
    reference=reference.low_rank_fusion,
    fake=_low_rank_fusion_fake,
    cpu=NativeKernels(weights=("factors",)),
    triton=TritonKernels(),
    keeps=Kept({"bias": ""}, never="bias"),
)
