"""The cross-entropy of the logits that a linear head makes of hidden states, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops import _checks as checks
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops.multimodal_cross_entropy import reference


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return linear_loss.fake([(hidden, weight, bias)], rest[-1])


def _check_range(labels: Tensor, valid: Tensor, classes: int) -> None:
    wrong = valid & ((labels < 0) | (labels >= classes))
    if wrong.any():
        expected = f"labels from 0 to {classes - 1}, or ignore_index"
        raise checks.value_error("multimodal_cross_entropy", "labels", expected, labels[wrong][0].item())


def forward(
    rows_in_place: Callable[..., None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    modulation: Tensor | None,
    label_smoothing: float,
    robust: str | None,
    q: float,
    wanted: Sequence[bool],
    training: bool,
) -> tuple[Tensor, ...]:
    """``rows_in_place`` is ``torch.ops.mmkernels._cross_entropy_rows`` or does what it does."""
    if hidden.is_cpu:
        _check_range(labels, valid, weight.shape[0])

    def of_chunk(logits: list[Tensor], labels: Tensor | None, gradients: list[bool], losses: Tensor) -> None:
        rows_in_place(logits[0], labels, label_smoothing, robust, q, gradients[0], losses)

    marks = labels.masked_fill(~valid, -1)
    return linear_loss.forward(of_chunk, [(hidden, weight, bias)], valid, marks, [training and w for w in wanted])


def backward(rows_in_place: Callable[..., None], grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *args, saved, needed = rest
    modulation = args[5]

    def again(wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        return forward(rows_in_place, *args[:9], wanted, True)  # type: ignore[call-arg]

    empty = grads[0].new_empty(0)
    pulled = linear_loss.backward(again, grads[0], args[:3], saved, needed[:3], modulation)
    of_modulation = torch.zeros_like(modulation) if modulation is not None and needed[5] else empty
    return [*pulled, empty, grads[0].new_empty(0), of_modulation]


def _reference_saved(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: Tensor, _: Any, *options: Any
) -> tuple[Tensor, ...]:
    def mean(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear_cross_entropy(hidden, weight, bias, labels, valid, None, *options)

    saved = _fake(hidden, weight, bias, *options)[1:]
    return linear_loss.saved_by_reference(mean, (hidden, weight, bias), saved, valid.sum())


def _compiled_rows(*args: Any) -> None:
    torch.ops.mmkernels._cross_entropy_rows(*args)


linear_op = DifferentiableOp(
    "multimodal_cross_entropy_linear",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor valid, Tensor? modulation, "
    "float label_smoothing, str? robust, float q, bool[] wanted",
    outputs="Tensor loss",
    saved="Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor count",
    reference=reference.linear_cross_entropy,
    reference_saved=_reference_saved,
    fake=_fake,
    cpu=NativeKernels(
        "cross_entropy_rows", composed=(partial(forward, _compiled_rows), partial(backward, _compiled_rows))
    ),
    triton=TritonKernels(op="multimodal_cross_entropy", prefix="linear_"),
)
