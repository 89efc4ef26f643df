"""distillation_loss on GPUs.

    s, t = softmax(student / T), softmax(teacher / T),   KL(a‖b) = Σ a log(a/b) − a + b
    of z_a and z_b, over T:  dKL(a‖b)/dz_a = a (log(a/b) − KL),   dKL(a‖b)/dz_b = b − a
    jsd: dz_t = β t (log(t/m) − KL(t‖m)),   dz_s = (1−β) s (log(s/m) − KL(s‖m)),   m = β t + (1−β) s

Tiling     a program owns a row, and walks over BLOCK classes at a time. Forward: once for maxima and sums, every lane
           with its own, once for the divergence, from cache. Backward: once.
Precision  float32; log(a/b) is the difference of distances from the maxima. The losses of rows are summed by torch.
Limits     up to 2^31 classes. Rows whose label is ignored are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.distillation_loss import linear, reference
from mmkernels.ops.distillation_loss.op import Arguments
from mmkernels.triton.launch import Config, launch, next_power_of_2
from mmkernels.triton.logits import no_logits, of_lanes, with_logits


@triton.jit
def _exp_remainder(x):
    """(e^x − 1 − x) / x² for |x| ≤ ½, by its series."""
    p = x * 2.7557319e-6 + 2.4801587e-5
    p = p * x + 1.9841270e-4
    p = p * x + 1.3888889e-3
    p = p * x + 8.3333333e-3
    p = p * x + 4.1666667e-2
    p = p * x + 1.6666667e-1
    return p * x + 0.5


@triton.jit
def _log1p(u):
    """Of −1 < u ≤ 0: the rounding of 1 + u is the same above and below the line."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _term(p, q, ratio):
    """p log(p/q) − p + q, from log(p/q)."""
    near = tl.abs(ratio) < 0.5
    small = tl.where(near, ratio, 0.0)
    return tl.where(near, p * (small * small) * _exp_remainder(-small), p * ratio + (q - p))


@triton.jit
def _over_mixture(ratio, beta):
    """log(t/m) and log(s/m) from log(t/s)."""
    above = ratio > 0
    below = tl.where(above, -ratio, ratio)
    small = tl.where(below > -0.5, below, 0.0)
    less = tl.where(below > -0.5, small + small * small * _exp_remainder(small), tl.exp(below) - 1.0)
    log_m = _log1p(tl.where(above, 1.0 - beta, beta) * less)
    return tl.where(above, 0.0, ratio) - log_m, tl.where(above, -ratio, 0.0) - log_m


@triton.jit
def _pair(student, teacher, c, classes):
    inside = c < classes
    s = tl.load(student + c, mask=inside, other=float("-inf")).to(tl.float32)
    t = tl.load(teacher + c, mask=inside, other=float("-inf")).to(tl.float32)
    return s, t


@triton.jit
def _probabilities(s, t, s_top, s_total, t_top, t_total, scale):
    """Of both, and log(t/s), where both have classes."""
    s_distance, t_distance = (s - s_top) * scale, (t - t_top) * scale
    p_s = tl.exp(s_distance) / tl.where(s_total == 0.0, 1.0, s_total)
    p_t = tl.exp(t_distance) / tl.where(t_total == 0.0, 1.0, t_total)
    both = (s_total != 0.0) & (t_total != 0.0)
    offset = tl.where(both, tl.log(tl.where(both, s_total, 1.0) / tl.where(both, t_total, 1.0)), 0.0)
    defined = (s != float("-inf")) & (t != float("-inf"))
    return p_s, p_t, tl.where(defined, t_distance - s_distance, 0.0) + offset


@triton.jit(do_not_specialize=["student_row", "teacher_row"])
def _forward(
    student,  # [N, V]
    teacher,  # [N, V]
    ignored,  # [N] or None
    losses,  # [N]
    statistics,  # [N, 6]
    classes,
    student_row,  # strides
    teacher_row,
    scale,  # 1 / T
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    statistics += row * 6
    end = tl.where(tl.load(ignored + row) != 0, 0, classes) if ignored is not None else classes
    lanes = tl.arange(0, BLOCK)
    s_top, s_total = no_logits(BLOCK)
    t_top, t_total = no_logits(BLOCK)
    for start in range(0, end, BLOCK):
        s, t = _pair(student, teacher, start + lanes, classes)
        s_top, s_total = with_logits(s_top, s_total, s, scale)
        t_top, t_total = with_logits(t_top, t_total, t, scale)
    s_most, s_sum = of_lanes(s_top, s_total, scale)
    t_most, t_sum = of_lanes(t_top, t_total, scale)
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, end, BLOCK):
        s, t = _pair(student, teacher, start + lanes, classes)
        p_s, p_t, ratio = _probabilities(s, t, s_most, s_sum, t_most, t_sum, scale)
        no_s, no_t = s == float("-inf"), t == float("-inf")
        if KIND == "forward_kl":
            first += tl.where(no_t, p_s, tl.where(no_s, float("inf"), _term(p_t, p_s, ratio)))
        elif KIND == "reverse_kl":
            first += tl.where(no_s, p_t, tl.where(no_t, float("inf"), _term(p_s, p_t, -ratio)))
        else:
            m = beta * p_t + (1.0 - beta) * p_s
            t_over_m, s_over_m = _over_mixture(ratio, beta)
            t_over_m = tl.where(no_s, -tl.log(beta), t_over_m)
            s_over_m = tl.where(no_t, -tl.log(1.0 - beta), s_over_m)
            first += tl.where(no_t, m, _term(p_t, m, t_over_m))
            second += tl.where(no_s, m, _term(p_s, m, s_over_m))
    kl, other = tl.sum(first, 0), tl.sum(second, 0)
    if KIND == "jsd":
        both = (s_sum != 0.0) & (t_sum != 0.0)  # else m is a multiple of the one that has classes
        kl = tl.where(both, kl, tl.where(t_sum != 0.0, -tl.log(beta), 0.0))
        other = tl.where(both, other, tl.where(s_sum != 0.0, -tl.log(1.0 - beta), 0.0))
        loss = beta * kl + (1.0 - beta) * other
    else:
        kl = tl.where((t_sum if KIND == "forward_kl" else s_sum) == 0.0, 0.0, kl)
        loss = kl
    tl.store(losses + row, loss)
    tl.store(statistics, s_most)
    tl.store(statistics + 1, s_sum)
    tl.store(statistics + 2, t_most)
    tl.store(statistics + 3, t_sum)
    tl.store(statistics + 4, kl)
    tl.store(statistics + 5, other)


@triton.jit(do_not_specialize=["student_row", "teacher_row"])
def _backward(
    factor,  # of every row's gradient, a number in memory
    student,  # [N, V]
    teacher,  # [N, V]
    ignored,  # [N] or None
    statistics,  # [N, 6]
    dstudent,  # [N, V] or None
    dteacher,  # [N, V] or None
    classes,
    student_row,  # strides
    teacher_row,
    scale,
    beta,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    statistics += row * 6
    g = tl.load(factor)
    s_top, s_total = tl.load(statistics), tl.load(statistics + 1)
    t_top, t_total = tl.load(statistics + 2), tl.load(statistics + 3)
    kl, other = tl.load(statistics + 4), tl.load(statistics + 5)
    if KIND == "forward_kl":
        counts = t_total != 0.0
    elif KIND == "reverse_kl":
        counts = s_total != 0.0
    else:
        counts = (s_total != 0.0) & (t_total != 0.0)
    seen = classes
    if ignored is not None:
        skipped = tl.load(ignored + row) != 0
        counts = counts & (skipped == 0)
        seen = tl.where(skipped, 0, classes)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, classes, BLOCK):
        c = start + lanes
        s, t = _pair(student, teacher, c, seen)
        p_s, p_t, ratio = _probabilities(s, t, s_top, s_total, t_top, t_total, scale)
        no_s, no_t = s == float("-inf"), t == float("-inf")
        if KIND == "forward_kl":
            ds, dt = p_s - p_t, p_t * (tl.where(no_s, float("inf"), ratio) - kl)
        elif KIND == "reverse_kl":
            ds, dt = p_s * (tl.where(no_t, float("inf"), -ratio) - kl), p_t - p_s
        else:
            t_over_m, s_over_m = _over_mixture(ratio, beta)
            t_over_m = tl.where(no_s, -tl.log(beta), t_over_m)
            s_over_m = tl.where(no_t, -tl.log(1.0 - beta), s_over_m)
            ds, dt = (1.0 - beta) * p_s * (s_over_m - other), beta * p_t * (t_over_m - kl)
        inside = c < classes
        at = row * classes + c
        if dstudent is not None:
            ds = tl.where(no_s | (counts == 0), 0.0, g * ds)
            tl.store(dstudent + at, ds.to(dstudent.dtype.element_ty), mask=inside)
        if dteacher is not None:
            dt = tl.where(no_t | (counts == 0), 0.0, g * dt)
            tl.store(dteacher + at, dt.to(dteacher.dtype.element_ty), mask=inside)


def _config(classes: int) -> Config:
    """Four classes per thread, the most that the jsd's forward has registers for, up to 1024 at a time."""
    block = min(max(next_power_of_2(classes), 128), 1024)
    return Config({"BLOCK": block}, num_warps=block // 128, num_stages=1)


def _ignored(labels: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """[N] flags, and how many rows count, at least 1."""
    ignored = reference.ignored_rows(labels, ignore_index)
    if ignored is None:
        return None, None
    return ignored.view(torch.uint8), (~ignored).sum().clamp_min(1)


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor]:
    student, teacher, labels, temperature, kind, beta, ignore_index = a
    rows, classes = student.shape
    losses = student.new_empty(rows, dtype=torch.float32)
    statistics = student.new_empty((rows, 6), dtype=torch.float32)
    ignored, count = _ignored(labels, ignore_index)
    if _is_constant(kind, beta) or classes == 0:
        losses.zero_()
        statistics.zero_()
    else:
        launch(
            _forward,
            (rows,),
            *(student, teacher, ignored, losses, statistics, classes, student.stride(0), teacher.stride(0)),
            *(1.0 / temperature, beta),
            config=_config(classes),
            KIND=kind,
        )
    loss = losses.sum() * temperature**2 / (max(rows, 1) if count is None else count)
    return loss.to(student.dtype), statistics if training else statistics.new_empty(0)


def _is_constant(kind: str, beta: float) -> bool:
    """Whether m is one of both."""
    return kind == "jsd" and beta in (0.0, 1.0)


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    student, teacher, labels, temperature, kind, beta, ignore_index = a
    rows, classes = student.shape
    results = [x.new_empty(x.shape if n else 0) for x, n in zip((student, teacher), needed, strict=False)]
    if _is_constant(kind, beta) or student.numel() == 0:
        return [*(x.zero_() for x in results), student.new_empty(0)]
    ignored, count = _ignored(labels, ignore_index)
    factor = grads[0].float() * temperature / (rows if count is None else count)
    launch(
        _backward,
        (rows,),
        *(factor, student, teacher, ignored, saved[0].contiguous()),
        *(x if n else None for x, n in zip(results, needed, strict=False)),
        *(classes, student.stride(0), teacher.stride(0), 1.0 / temperature, beta),
        config=_config(classes),
        KIND=kind,
    )
    return [*results, student.new_empty(0)]


def rows_in_place(
    student: Tensor,
    teacher: Tensor,
    ignored: Tensor | None,
    temperature: float,
    kind: str,
    beta: float,
    of_student: bool,
    of_teacher: bool,
    losses: Tensor,
) -> None:
    """As ``torch.ops.mmkernels._distillation_rows``: the losses of rows, and gradients in the place of the logits."""
    rows, classes = student.shape
    flags = (of_student, of_teacher)
    outputs = [x if of else None for x, of in zip((student, teacher), flags, strict=True)]
    if _is_constant(kind, beta) or student.numel() == 0:
        for x in (losses, *outputs):
            if x is not None:
                x.zero_()
        return
    statistics = losses.new_empty((rows, 6))
    flags_of_rows = None if ignored is None else ignored.view(torch.uint8)
    rest = (classes, student.stride(0), teacher.stride(0), 1.0 / temperature, beta)
    options: dict[str, Any] = dict(config=_config(classes), KIND=kind)
    launch(_forward, (rows,), student, teacher, flags_of_rows, losses, statistics, *rest, **options)
    losses.mul_(temperature**2)
    if any(flags):
        factor = losses.new_full((), temperature)
        launch(_backward, (rows,), factor, student, teacher, flags_of_rows, statistics, *outputs, *rest, **options)


def linear_forward(*args: Any) -> Any:
    return linear.forward(rows_in_place, *args)


def linear_backward(*args: Any) -> list[Tensor]:
    return linear.backward(rows_in_place, *args)


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A vocabulary by every kind, with labels, and from hidden states; few classes."""
    import mmkernels as mmk

    def call(kind: Any, rows: int, classes: int, **options: Any) -> Any:
        return mmk.distillation_loss(new(rows, classes), new(rows, classes), temperature=2.0, kind=kind, **options)

    yield "forward_kl 4096x32000", lambda: call("forward_kl", 4096, 32000)
    yield "reverse_kl 4096x32000, labels", lambda: call("reverse_kl", 4096, 32000, labels=new(4096, dtype=torch.int64))
    yield "jsd 4096x32000", lambda: call("jsd", 4096, 32000)
    yield "forward_kl 256x10", lambda: call("forward_kl", 256, 10)
    hidden, heads = new(4096, 512), [(new(32000, 512), None) for _ in range(2)]
    yield "forward_kl 4096x512 to 32000", lambda: mmk.distillation_loss(hidden, new(4096, 512), linear=heads)
