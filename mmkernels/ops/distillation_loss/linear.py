"""The divergence of the logits that two linear heads make of hidden states, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops.distillation_loss import reference


class Arguments(NamedTuple):
    student: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    valid: Tensor | None
    temperature: float
    kind: str
    beta: float
    wanted: Sequence[bool]


_SAVED = ", ".join(f"Tensor grad_{name}" for name in Arguments._fields[:6])


def _sources(a: Arguments) -> list[linear_loss.Source]:
    return [(a.student, a.student_weight, a.student_bias), (a.teacher, a.teacher_weight, a.teacher_bias)]


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    return linear_loss.fake(_sources(a), a.wanted)


def forward(rows_in_place: Callable[..., None], a: Arguments, training: bool) -> tuple[Tensor, ...]:
    """``rows_in_place`` is ``torch.ops.mmkernels._distillation_rows`` or does what it does."""

    def of_chunk(logits: list[Tensor], ignored: Tensor | None, gradients: list[bool], losses: Tensor) -> None:
        rows_in_place(*logits, ignored, a.temperature, a.kind, a.beta, *gradients, losses)

    ignored = None if a.valid is None else ~a.valid
    return linear_loss.forward(of_chunk, _sources(a), a.valid, ignored, a.wanted, training)


def backward(
    rows_in_place: Callable[..., None],
    grads: Sequence[Tensor],
    a: Arguments,
    saved: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    def again(wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        return forward(rows_in_place, a._replace(wanted=wanted), True)

    pulled = linear_loss.backward(again, grads[0], a[:6], saved, needed[:6])
    return [*pulled, grads[0].new_empty(0)]


def _reference_saved(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args)

    def mean(*leaves: Tensor | None) -> Tensor:
        return reference.linear_distillation_loss(*leaves, *args[6:])  # type: ignore[arg-type]

    count = a.student.shape[0] if a.valid is None else a.valid.sum()
    return linear_loss.saved_by_reference(mean, a[:6], _fake(a)[1:], count)


def _compiled_rows(*args: Any) -> None:
    torch.ops.mmkernels._distillation_rows(*args)


linear_op = DifferentiableOp(
    "distillation_loss_linear",
    Arguments,
    outputs="Tensor loss",
    saved=f"{_SAVED}, Tensor count",
    reference=reference.linear_distillation_loss,
    reference_saved=_reference_saved,
    fake=_fake,
    cpu=NativeKernels(
        name="distillation_rows", composed=(partial(forward, _compiled_rows), partial(backward, _compiled_rows))
    ),
    triton=TritonKernels(op="distillation_loss", prefix="linear_"),
)
