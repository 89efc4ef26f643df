"""distillation_loss in plain PyTorch: the specification every kernel is tested against.

    s, t = softmax(student / T), softmax(teacher / T);   KL(p‖q) = Σ_c p_c log(p_c / q_c),   0 log 0 = 0
    forward_kl: T² KL(t‖s);   reverse_kl: T² KL(s‖t);   jsd: T² [β KL(t‖m) + (1−β) KL(s‖m)],  m = β t + (1−β) s

Runs on every device and dtype, in float32 or wider, differentiable any number of times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) of rows; a class with logit −inf is a constant −inf, also where all classes are."""
    z = logits / temperature
    impossible = z == -torch.inf
    none = impossible.all(-1, keepdim=True)
    return torch.log_softmax(z.masked_fill(none, 0), -1).masked_fill(impossible, -torch.inf)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of each row."""
    impossible = log_p == -torch.inf
    log_p, log_q = log_p.masked_fill(impossible, 0), log_q.masked_fill(impossible, 0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(impossible, 0).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(β p + (1−β) q)."""
    impossible = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_p, log_q = log_p.masked_fill(impossible, 0), log_q.masked_fill(impossible, 0)
    mixed = torch.logaddexp(log_p + _log(beta), log_q + _log(1 - beta))
    return mixed.masked_fill(impossible, -torch.inf)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _divergences(s: Tensor, t: Tensor, temperature: float, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Of each row KL(t‖s), or KL(s‖t), or of the jsd KL(t‖m) and KL(s‖m)."""
    log_s, log_t = log_probabilities(s, temperature), log_probabilities(t, temperature)
    if kind != "jsd":
        first = divergence(log_t, log_s) if kind == "forward_kl" else divergence(log_s, log_t)
        return first, torch.zeros_like(first)
    if beta in (0, 1):  # m is one of both
        return 0 * divergence(log_t, log_t), 0 * divergence(log_s, log_s)
    log_m = log_mixture(log_t, log_s, beta)
    return divergence(log_t, log_m), divergence(log_s, log_m)


def row_statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    kind: str,
    beta: float,
    ignore_index: int,
) -> tuple[Tensor]:
    """[N, 6], float32 or float64: maximum and Σ exp((z − it) / T) of student and of teacher, and the divergences; 0 of
    ignored rows."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    columns = []
    for z in (student.to(dtype), teacher.to(dtype)):
        top = z.amax(1).clamp_min(torch.finfo(dtype).min) if z.shape[1] else z.new_zeros(z.shape[0])
        columns += [top, ((z - top.unsqueeze(1)) / temperature).exp().sum(1)]
    columns += _divergences(student.to(dtype), teacher.to(dtype), temperature, kind, beta)
    statistics = torch.stack(columns, 1)
    ignored = ignored_rows(labels, ignore_index)
    return (statistics if ignored is None else statistics.masked_fill(ignored.unsqueeze(1), 0),)


def ignored_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """[N] bool; in int64, where no number wraps to a label."""
    return None if labels is None else labels.to(torch.int64) == ignore_index


def mean_divergence(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    ignored: Tensor | None,  # [N] bool
    temperature: float,
    kind: str,
    beta: float,
) -> Tensor:
    """The mean over the rows that are not ignored, in float32 at least; 0 where there are none."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(dtype), teacher.to(dtype)
    count: Tensor | int = max(student.shape[0], 1)
    if ignored is not None:
        count = (~ignored).sum(dtype=dtype).clamp_min(1)
        s, t = s.masked_fill(ignored[:, None], 0), t.masked_fill(ignored[:, None], 0)
    first, second = _divergences(s, t, temperature, kind, beta)
    losses = beta * first + (1 - beta) * second if kind == "jsd" else first
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0)
    return (losses * (temperature**2 / count)).sum()  # of rows: a 0-dim product with a number is widened by torch.func


def distillation_loss(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    labels: Tensor | None,  # [N] integers
    temperature: float,
    kind: str,
    beta: float,
    ignore_index: int,
) -> Tensor:
    """The mean over the rows whose label is not ``ignore_index``, in the logits' dtype."""
    ignored = ignored_rows(labels, ignore_index)
    return mean_divergence(student, teacher, ignored, temperature, kind, beta).to(student.dtype)


def linear_distillation_loss(
    student: Tensor,  # [N, D_s]
    student_weight: Tensor,  # [V, D_s]
    student_bias: Tensor | None,  # [V]
    teacher: Tensor,  # [N, D_t]
    teacher_weight: Tensor,  # [V, D_t]
    teacher_bias: Tensor | None,  # [V]
    valid: Tensor | None,  # [N] bool
    temperature: float,
    kind: str,
    beta: float,
    *_: Any,
) -> Tensor:
    """The mean over the valid rows of the logits that two heads make of hidden states, in float32 at least."""
    ignored = None if valid is None else ~valid
    logits = []
    for hidden, weight, bias in ((student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias)):
        z = linear(hidden if ignored is None else hidden.masked_fill(ignored[:, None], 0), weight)
        logits.append(z if bias is None else z + bias)
    return mean_divergence(logits[0], logits[1], ignored, temperature, kind, beta)


def example_inputs(draw: Draw, B: int = 5, C: int = 6) -> Examples:
    return {
        "labels": {
            "student": draw(B, C),
            "teacher": draw(B, C),
            "temperature": 2.0,
            "labels": draw.whole(3, B),
            "ignore_index": 0,
        },
        "sequences": {
            "student": draw(2, B, C),
            "teacher": draw(2, B, C),
            "kind": "jsd",
            "beta": 0.3,
            "labels": draw.whole(3, 2, B),
            "ignore_index": 0,
        },
        "plain": {"student": draw(B, C), "teacher": draw(B, C), "kind": "reverse_kl"},
        "hidden states": {
            "student": draw(B, 4),
            "teacher": draw(B, 2),
            "kind": "jsd",
            "linear": [(draw(C, 4), draw(C)), (draw(C, 2), None)],
        },
    }
