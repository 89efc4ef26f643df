"""Knowledge distillation: how far a student's predictions are from a teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door, needs_grad
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops._contrastive import PLAIN
from mmkernels.ops._labels import check_ignore_index, check_labels
from mmkernels.ops._rows import as_rows
from mmkernels.ops.distillation_loss.linear import linear_op
from mmkernels.ops.distillation_loss.op import distillation_loss_op

__all__ = ["distillation_loss"]

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
KINDS = ("forward_kl", "reverse_kl", "jsd")

_NAME = "distillation_loss"
_HALVES = (torch.bfloat16, torch.float16)


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    kind: Kind = "forward_kl",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    linear: Sequence[tuple[Tensor, Tensor | None]] | None = None,
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
        linear: two heads (weight (V, D), bias (V,) or None), the student's and the teacher's. In the place of logits
            come hidden states then, student (…, D_s) and teacher (…, D_t), and the logits hidden @ weight.T + bias are
            made chunk by chunk and never held: for vocabularies of 32 000 classes and more. Gradients of all six, for
            what requires one.

    A class whose logit is −inf has probability 0 and gradient 0, and 0 log 0 = 0: forward_kl is +inf where the teacher
    allows what the student excludes, reverse_kl where it is the other way about. Under autocast logits are cast to
    float32, as torch does for losses; hidden states and heads to autocast's dtype, and the loss is float32.

    Returns:
        A scalar in the dtype of the logits, made in float32; 0, with gradient 0, where no row counts. For the backward
        six numbers of each row are kept, and it writes the gradient in one pass over the logits.

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
        made: tuple[Tensor, Tensor, Tensor | None] | None = (student, teacher, labels)
        if linear is not None:
            made = _small_logits(student, teacher, linear, labels, ignore_index)
        out = made and distillation_loss_op.unchecked(*made, temperature, kind, beta, ignore_index)
        if out is not None:
            return out
    if is_overridden(student, teacher, labels, linear):
        return overridden_call(distillation_loss, locals())
    checks.check_tensor(_NAME, "student", student)
    checks.check_tensor(_NAME, "teacher", teacher)
    heads = None if linear is None else linear_loss.heads_in(_NAME, linear, 2, "each of student and teacher")
    if wide := checks.autocast_is_on(student.device):
        if heads is None:
            student, teacher = (x.float() if x.dtype in _HALVES else x for x in (student, teacher))
        else:
            student, teacher, heads = fusion.autocast(student.device, student, teacher, heads)
    _check_logits(student, teacher, heads)
    ignore_index = check_ignore_index(_NAME, ignore_index)
    if labels is not None:
        lead = student.shape[:-1]
        labels = check_labels(_NAME, "labels", labels, lead, student, "student", ignore_index).reshape(-1)
    temperature, beta = check_options(_NAME, temperature, kind, beta)
    if heads is None:
        rows = as_rows(student), as_rows(teacher)
        return distillation_loss_op(*rows, labels, temperature, kind, beta, ignore_index)[0]
    valid = None if labels is None else labels != ignore_index
    leaves = (as_rows(student), *heads[0], as_rows(teacher), *heads[1])
    wanted = [needs_grad(x) for x in leaves]
    loss = linear_op(*leaves, valid, temperature, kind, beta, wanted)[0]
    return loss if wide else loss.to(student.dtype)


def _small_logits(
    student: Any, teacher: Any, linear: Any, labels: Any, ignore_index: Any
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The logits and labels as rows; see `linear_loss.small_logits`."""
    if type(ignore_index) is not int or not all(type(x) in PLAIN and x.dim() > 0 for x in (student, teacher)):
        return None
    if student.shape[:-1] != teacher.shape[:-1] or student.dtype != teacher.dtype:
        return None
    valid = None
    if labels is not None:
        if type(labels) not in PLAIN or labels.dtype is not torch.int64 or labels.shape != student.shape[:-1]:
            return None
        labels = labels.reshape(-1)
        valid = labels != ignore_index
    made = linear_loss.small_logits((as_rows(student), as_rows(teacher)), linear, lambda _: valid)
    return None if made is None else (made[0], made[1], labels)


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


def _check_logits(student: Tensor, teacher: Tensor, heads: Sequence[linear_loss.Head] | None) -> None:
    if student.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "student", "dtype float32, bfloat16, float16 or float64", student.dtype)
    if student.dim() == 0:
        raise checks.value_error(_NAME, "student", f"at least 1 dim (…, {'D' if heads else 'V'})", "a scalar")
    if heads is None:
        fusion.check_shaped(_NAME, "teacher", teacher, tuple(student.shape), student, "student")
    else:
        _check_hidden(student, teacher, heads)


def _check_hidden(student: Tensor, teacher: Tensor, heads: Sequence[linear_loss.Head]) -> None:
    """Hidden states of the same rows, and heads of the same classes."""
    checks.check_same_kind(_NAME, student, "student", teacher=teacher)
    lead = tuple(student.shape[:-1])
    if teacher.dim() != student.dim() or teacher.shape[:-1] != lead:
        expected = f"shape {fusion.shape_text((*lead, 'D'))}, the leading dims of student"
        raise checks.value_error(_NAME, "teacher", expected, tuple(teacher.shape))
    classes, of_teacher = linear_loss.check_heads(_NAME, heads, [student, teacher], "student")
    if classes != of_teacher:
        raise checks.value_error(_NAME, "linear[1][0]", f"{classes} classes, as many as linear[0][0]", of_teacher)
