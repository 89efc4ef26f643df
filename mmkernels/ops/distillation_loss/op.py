"""Registration of distillation_loss: schema, shape of its output, backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops.distillation_loss import reference


class Arguments(NamedTuple):
    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    temperature: float
    kind: str
    beta: float
    ignore_index: int


# Of every row: maximum and sum of exponentials of student and of teacher, and up to two divergences.
STATISTICS = 6


def _distillation_loss_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    student = a.student
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(()), student.new_empty((student.shape[0], STATISTICS), dtype=wide)


def _triton_supports(a: Arguments) -> str | None:
    student = a.student
    if max(student.shape) >= 2**31:
        return f"sizes of {tuple(student.shape)} are counted in 32 bits"
    return None


distillation_loss_op = DifferentiableOp(
    "distillation_loss",
    Arguments,
    outputs="Tensor loss",
    saved="Tensor statistics",
    reference=reference.distillation_loss,
    reference_saved=reference.row_statistics,
    fake=_distillation_loss_fake,
    triton=TritonKernels(_triton_supports),
)
