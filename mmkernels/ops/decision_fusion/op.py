"""Registration of decision_fusion: schema, shape of its output, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, native_backend
from mmkernels.ops.decision_fusion import reference


def _decision_fusion_fake(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor]:
    return (logits[0].new_empty(logits[0].shape),)


decision_fusion_op = DifferentiableOp(
    "decision_fusion",
    "Tensor[] logits, Tensor? weights, str method, Tensor? presence",
    outputs="Tensor probabilities",
    reference=reference.decision_fusion,
    fake=_decision_fusion_fake,
    cpu=native_backend("decision_fusion"),
)
