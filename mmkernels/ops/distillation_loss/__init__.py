"""Knowledge distillation: how far a student's predictions are from a teacher's."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._rows import as_rows
from mmkernels.ops.distillation_loss.op import distillation_loss_op

__all__ = ["distillation_loss"]

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
KINDS = ("forward_kl", "reverse_kl", "jsd")

_NAME = "distillation_loss"


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The divergence between the softened predictions of a teacher and of a student, from the logits of both.

        s, t = softmax(student / T), softmax(teacher / T),   KL(p‖q) = Σ_c p_c log(p_c / q_c)

        forward_kl   T² KL(t‖s)
        reverse_kl   T² KL(s‖t)
        jsd          T² [β KL(t‖m) + (1−β) KL(s‖m)],   m = β t + (1−β) s

    as the mean over rows. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531);
    Agarwal et al., "On-Policy Distillation of Language Models", 2023 (arXiv:2306.13649) for the other two.

    Args:
        student: logits (…, V), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last
            dim that is not contiguous costs a copy.
        teacher: logits (…, V), of the same shape and dtype. It has a gradient where it requires one; one that does not
            costs nothing.
        temperature: T > 0.
        kind: which of the formulas.
        beta: β of the jsd, in 0 … 1, at whose ends it is 0.
        labels: (…) integers. A row whose label is ``ignore_index`` is not read and does not count; other labels have no
            meaning here.
        ignore_index: see labels.

    A class whose logit is −inf has probability 0 and gradient 0, and 0 log 0 = 0: forward_kl is +inf where the teacher
    allows what the student excludes, reverse_kl where it is the other way about. Under autocast both are cast to
    float32, as torch does for losses.

    Returns:
        A scalar in the dtype of the logits, made in float32; 0, with gradient 0, where no row counts. For the backward
        six numbers of each row are kept, and it writes the gradient in one pass over the logits.

    Raises:
        ValueError: shapes or values that do not fit.
        TypeError: a wrong type or dtype.
        RuntimeError: tensors on different devices.
        mmkernels.UnsupportedError: a forced backend cannot serve the call.

    Example:
        >>> student, teacher = torch.randn(8, 50), torch.randn(8, 50)
        >>> distillation_loss(student, teacher, temperature=2.0).shape
        torch.Size([])
    """
    if (
        may_use_door()
        and type(temperature) is float
        and 0 < temperature < math.inf
        and type(beta) is float
        and 0 <= beta <= 1
    ):
        out = distillation_loss_op.unchecked(student, teacher, labels, temperature, kind, beta, ignore_index)
        if out is not None:
            return out
    if is_overridden(student, teacher, labels):
        return overridden_call(distillation_loss, locals())
    checks.check_tensor(_NAME, "student", student)
    checks.check_tensor(_NAME, "teacher", teacher)
    if checks.autocast_is_on(student.device):
        student, teacher = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (student, teacher))
    _check_tensors(student, teacher, labels)
    temperature, beta = check_options(_NAME, temperature, kind, beta)
    ignore_index = checks.check_index(_NAME, "ignore_index", ignore_index)
    if labels is not None:
        labels = labels.reshape(-1)
    return distillation_loss_op(as_rows(student), as_rows(teacher), labels, temperature, kind, beta, ignore_index)[0]


def check_options(op: str, temperature: Any, kind: Any, beta: Any) -> tuple[float, float]:
    """Temperature and beta as floats."""
    if kind not in KINDS:
        expected = f"one of {', '.join(KINDS)}"
        if not isinstance(kind, str):
            raise checks.type_error(op, "kind", expected, type(kind).__name__)
        raise checks.value_error(op, "kind", expected, repr(kind))
    temperature, beta = checks.check_number(op, "temperature", temperature), checks.check_number(op, "beta", beta)
    if not (0 < temperature < math.inf):
        raise checks.value_error(op, "temperature", "a finite number above 0", temperature)
    if not (0 <= beta <= 1):
        raise checks.value_error(op, "beta", "a number in 0 … 1", beta)
    return temperature, beta


def _check_tensors(student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
    if student.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "student", "dtype float32, bfloat16, float16 or float64", student.dtype)
    if student.dim() == 0:
        raise checks.value_error(_NAME, "student", "at least 1 dim (…, V)", "a scalar")
    fusion.check_shaped(_NAME, "teacher", teacher, tuple(student.shape), student, "student")
    if labels is None:
        return
    checks.check_tensor(_NAME, "labels", labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise checks.type_error(_NAME, "labels", "an integer dtype", labels.dtype)
    checks.check_same_device(_NAME, "labels", labels, "student", student.device)
    if not fusion.has_shape(labels, student.shape[:-1]):
        raise checks.value_error(_NAME, "labels", f"shape {tuple(student.shape[:-1])}", tuple(labels.shape))
