"""The cross-entropy of the logits that a linear head makes of hidden states, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops import _checks as checks
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops.multimodal_cross_entropy import reference


class Arguments(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    valid: Tensor
    modulation: Tensor | None
    label_smoothing: float
    robust: str | None
    q: float
    wanted: Sequence[bool]


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    return linear_loss.fake([(a.hidden, a.weight, a.bias)], a.wanted)


def _check_range(labels: Tensor, valid: Tensor, classes: int) -> None:
    wrong = valid & ((labels < 0) | (labels >= classes))
    if wrong.any():
        expected = f"labels from 0 to {classes - 1}, or ignore_index"
        raise checks.value_error("multimodal_cross_entropy", "labels", expected, labels[wrong][0].item())


def forward(rows_in_place: Callable[..., None], a: Arguments, training: bool) -> tuple[Tensor, ...]:
    """``rows_in_place`` is ``torch.ops.mmkernels._cross_entropy_rows`` or does what it does."""
    if a.hidden.is_cpu:
        _check_range(a.labels, a.valid, a.weight.shape[0])

    def of_chunk(logits: list[Tensor], labels: Tensor | None, gradients: list[bool], losses: Tensor) -> None:
        rows_in_place(logits[0], labels, a.label_smoothing, a.robust, a.q, gradients[0], losses)

    marks = a.labels.masked_fill(~a.valid, -1)
    return linear_loss.forward(of_chunk, [(a.hidden, a.weight, a.bias)], a.valid, marks, a.wanted, training)


def backward(
    rows_in_place: Callable[..., None],
    grads: Sequence[Tensor],
    a: Arguments,
    saved: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    def again(wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        return forward(rows_in_place, a._replace(wanted=wanted), True)

    pulled = linear_loss.backward(again, grads[0], a[:3], saved, needed[:3], a.modulation)
    of_modulation = torch.zeros_like(a.modulation) if a.modulation is not None and needed[5] else grads[0].new_empty(0)
    return [*pulled, grads[0].new_empty(0), grads[0].new_empty(0), of_modulation]


def _reference_saved(*args: Any) -> tuple[Tensor, ...]:
    a = Arguments(*args)

    def mean(*leaves: Tensor | None) -> Tensor:
        return reference.linear_cross_entropy(*leaves, *args[3:5], None, *args[6:])  # type: ignore[arg-type]

    return linear_loss.saved_by_reference(mean, a[:3], _fake(a)[1:], a.valid.sum())


def _compiled_rows(*args: Any) -> None:
    torch.ops.mmkernels._cross_entropy_rows(*args)


linear_op = DifferentiableOp(
    "multimodal_cross_entropy_linear",
    Arguments,
    outputs="Tensor loss",
    saved="Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor count",
    reference=reference.linear_cross_entropy,
    reference_saved=_reference_saved,
    fake=_fake,
    cpu=NativeKernels(
        name="cross_entropy_rows", composed=(partial(forward, _compiled_rows), partial(backward, _compiled_rows))
    ),
    triton=TritonKernels(op="multimodal_cross_entropy", prefix="linear_"),
)
