"""Registration of decision_fusion: schema, shape of its output, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops._pool import too_many_modalities
from mmkernels.ops.decision_fusion import reference


class Arguments(NamedTuple):
    logits: Sequence[Tensor]
    weights: Tensor | None
    method: str
    presence: Tensor | None


def _decision_fusion_fake(a: Arguments) -> tuple[Tensor]:
    logits = a.logits
    return (logits[0].new_empty(logits[0].shape),)


def _triton_supports(a: Arguments) -> str | None:
    logits = a.logits
    if logits[0].shape[-1] > 8192:
        return f"{logits[0].shape[-1]} classes are more than the 8192 that a program holds"
    if logits[0].shape[0] >= 2**31:
        return f"{logits[0].shape[0]} rows are counted in 32 bits"
    return too_many_modalities(logits)


decision_fusion_op = DifferentiableOp(
    "decision_fusion",
    Arguments,
    outputs="Tensor probabilities",
    reference=reference.decision_fusion,
    fake=_decision_fusion_fake,
    triton=TritonKernels(_triton_supports),
)
