"""Registration of multimodal_cross_entropy: schema, shapes of its outputs, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops.multimodal_cross_entropy import reference


class Arguments(NamedTuple):
    logits: Sequence[Tensor]
    labels: Sequence[Tensor]
    weights: Tensor | None
    log_vars: Tensor | None
    presence: Tensor | None
    modulation: Tensor | None
    label_smoothing: float
    ignore_index: int
    robust: str | None
    q: float
    wide: bool


def _multimodal_cross_entropy_fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, count = a.logits[0], len(a.logits)
    statistics = first.new_empty((count, first.shape[0], 2), dtype=torch.promote_types(first.dtype, torch.float32))
    total = (statistics if a.wide else first).new_empty(())
    return total, total.new_empty(count), statistics, statistics.new_empty(count)


def _triton_supports(a: Arguments) -> str | None:
    logits = a.logits
    if any(z.shape[1] == 0 for z in logits):
        return "logits of no classes"
    return None if logits[0].shape[0] < 2**31 else f"{logits[0].shape[0]} rows are counted in 32 bits"


multimodal_cross_entropy_op = DifferentiableOp(
    "multimodal_cross_entropy",
    Arguments,
    outputs="Tensor total, Tensor means",
    saved="Tensor statistics, Tensor kept",  # the softmax's top and total of every row, [M, B, 2]; the means
    reference=reference.multimodal_cross_entropy,
    reference_saved=reference.saved_statistics,
    fake=_multimodal_cross_entropy_fake,
    triton=TritonKernels(_triton_supports),
)
