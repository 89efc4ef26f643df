"""The divergence of the logits that two linear heads make of hidden states, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops.distillation_loss import reference

_SOURCES = "Tensor {0}, Tensor {0}_weight, Tensor? {0}_bias"
_GRADIENTS = "Tensor grad_{0}, Tensor grad_{0}_weight, Tensor grad_{0}_bias"


def _both(template: str) -> str:
    return ", ".join(template.format(name) for name in ("student", "teacher"))


def _sources(args: Sequence[Any]) -> list[linear_loss.Source]:
    return [(args[0], args[1], args[2]), (args[3], args[4], args[5])]


def _fake(*args: Any) -> tuple[Tensor, ...]:
    return linear_loss.fake(_sources(args), args[-1])


def forward(rows_in_place: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    """``rows_in_place`` is ``torch.ops.mmkernels._distillation_rows`` or does what it does."""
    *_, valid, temperature, kind, beta, wanted, training = args

    def of_chunk(logits: list[Tensor], ignored: Tensor | None, gradients: list[bool], losses: Tensor) -> None:
        rows_in_place(*logits, ignored, temperature, kind, beta, *gradients, losses)

    ignored = None if valid is None else ~valid
    return linear_loss.forward(of_chunk, _sources(args), valid, ignored, [training and w for w in wanted])


def backward(rows_in_place: Callable[..., None], grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *args, saved, needed = rest

    def again(wanted: Sequence[bool]) -> tuple[Tensor, ...]:
        return forward(rows_in_place, *args[:-1], wanted, True)

    pulled = linear_loss.backward(again, grads[0], args[:6], saved, needed[:6])
    return [*pulled, grads[0].new_empty(0)]


def _reference_saved(*args: Any) -> tuple[Tensor, ...]:
    valid, rows = args[6], args[0].shape[0]

    def mean(*leaves: Tensor | None) -> Tensor:
        return reference.linear_distillation_loss(*leaves, *args[6:])  # type: ignore[arg-type]

    return linear_loss.saved_by_reference(mean, args[:6], _fake(*args)[1:], rows if valid is None else valid.sum())


def _compiled_rows(*args: Any) -> None:
    torch.ops.mmkernels._distillation_rows(*args)


linear_op = DifferentiableOp(
    "distillation_loss_linear",
    f"{_both(_SOURCES)}, Tensor? valid, float temperature, str kind, float beta, bool[] wanted",
    outputs="Tensor loss",
    saved=f"{_both(_GRADIENTS)}, Tensor count",
    reference=reference.linear_distillation_loss,
    reference_saved=_reference_saved,
    fake=_fake,
    cpu=NativeKernels(
        "distillation_rows", composed=(partial(forward, _compiled_rows), partial(backward, _compiled_rows))
    ),
    triton=TritonKernels(op="distillation_loss", prefix="linear_"),
)
