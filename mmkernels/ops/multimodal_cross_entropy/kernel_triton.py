"""multimodal_cross_entropy in Triton.

    plain       −(1 − ε) log p_y − ε mean_c log p_c          grad_c = p_c − (1 − ε) [c = y] − ε / C
    gce         (1 − p_y^q) / q                              grad_c = p_y^q (p_c − [c = y])
    symmetric   −log p_y + 4 (1 − p_y)                       grad_c = (1 + 4 p_y) (p_c − [c = y])

Tiling     a program owns a row: a maximum and a sum in each lane while it walks over blocks of classes, met at the end;
           smoothed labels take a second walk. The gradient's programs own a block of a row each.
Precision  float32; probabilities from the distance to the row's maximum.
Limits     any number of classes, fewer than 2^31 rows. Labels are trusted, and nothing beyond a row is read for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.multimodal_cross_entropy import linear, reference
from mmkernels.ops.multimodal_cross_entropy.op import Arguments
from mmkernels.triton.launch import Config, ceil_div, launch, next_power_of_2
from mmkernels.triton.logits import no_logits, of_lanes, with_logits

# What of these is a multiple of 16 depends on the number of rows.
_NUMBERS = ["present_stride", "ignore_index", "smoothing", "q"]
_PER_ROW = ["label_ptr", "present_ptr", "loss_ptr", "statistics_ptr", "factor_ptr", "scale_ptr"]
_REVERSE = tl.constexpr(reference.REVERSE)


@triton.jit
def _is_valid(label, row, present_ptr, present_stride, ignore_index):
    valid = label != ignore_index
    if present_ptr is not None:
        valid = valid & tl.load(present_ptr + row * present_stride).to(tl.int1)
    return valid


@triton.jit
def _row_factor(of_label, q, KIND: tl.constexpr):
    """What a row's p_c − target_c is multiplied by."""
    if KIND == "gce":
        return tl.exp(q * of_label)
    elif KIND == "symmetric":
        return tl.exp(of_label) * _REVERSE + 1.0
    else:
        return of_label * 0.0 + 1.0


@triton.jit
def _one_minus_exp(x):
    """1 − exp x of x ≤ 0, near 0 by its series."""
    near = -x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0))))))
    return tl.where(x > -0.25, near, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_PER_ROW)
def _losses(
    z_ptr,  # [B, C]
    label_ptr,  # [B]
    present_ptr,  # [B] or None
    loss_ptr,  # [B]
    statistics_ptr,  # [B, 2]: top and total
    factor_ptr,  # [B] or None
    classes,
    stride,  # of rows of z
    present_stride,
    ignore_index,
    smoothing,  # ε
    q,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    valid = _is_valid(label, row, present_ptr, present_stride, ignore_index)
    count = tl.where(valid, classes, 0)  # a row that is not valid is not read
    z_ptr += row * stride
    lanes = tl.arange(0, BLOCK)
    tops, totals = no_logits(BLOCK)
    for start in range(0, count, BLOCK):
        z = tl.load(z_ptr + start + lanes, mask=start + lanes < classes, other=float("-inf")).to(tl.float32)
        tops, totals = with_logits(tops, totals, z, 1.0)
    top, total = of_lanes(tops, totals, 1.0)
    log_total = tl.where(total == 0.0, 0.0, tl.log(total))
    known = valid & (label >= 0) & (label < classes)
    of_label = tl.load(z_ptr + label, mask=known, other=0.0).to(tl.float32) - top - log_total
    if KIND == "gce":
        loss = _one_minus_exp(q * of_label) / q
    elif KIND == "symmetric":
        loss = _one_minus_exp(of_label) * _REVERSE - of_label
    elif SMOOTH:
        distances = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            inside = start + lanes < classes
            z = tl.load(z_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
            distances += tl.where(inside, z - top, 0.0)
        loss = -(1.0 - smoothing) * of_label - smoothing * (tl.sum(distances, 0) / classes - log_total)
    else:
        loss = -of_label
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0))
    tl.store(statistics_ptr + row * 2, tl.where(valid, top, 0.0))
    tl.store(statistics_ptr + row * 2 + 1, tl.where(valid, total, 1.0))
    if factor_ptr is not None:
        tl.store(factor_ptr + row, _row_factor(of_label, q, KIND))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_PER_ROW)
def _gradient(
    z_ptr,  # [B, C]
    label_ptr,  # [B]
    present_ptr,  # [B] or None
    statistics_ptr,  # [B, 2]
    factor_ptr,  # [B], or None: made of the label's logit
    scale_ptr,  # [], or None for 1
    grad_ptr,  # [B, C]; it may be z where there are factors
    classes,
    stride,
    grad_stride,
    present_stride,
    ignore_index,
    smoothing,
    q,
    KIND: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    valid = _is_valid(label, row, present_ptr, present_stride, ignore_index)
    z_ptr += row * stride
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + lanes, mask=valid & (lanes < classes), other=0.0).to(tl.float32)
    top = tl.load(statistics_ptr + row * 2)
    total = tl.load(statistics_ptr + row * 2 + 1)
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    if factor_ptr is not None:
        scale = scale * tl.load(factor_ptr + row)
    elif KIND is not None:
        known = valid & (label >= 0) & (label < classes)
        of_label = tl.load(z_ptr + label, mask=known, other=0.0).to(tl.float32) - top
        scale = scale * _row_factor(of_label - tl.where(total == 0.0, 0.0, tl.log(total)), q, KIND)
    share = tl.where(total == 0.0, 0.0, scale / total)
    g = tl.exp(z - top) * share
    taken = tl.where(lanes == label, scale * (1.0 - smoothing), 0.0)
    if SMOOTH:
        taken += scale * smoothing / classes
    g = tl.where(valid & (z != float("-inf")), g - taken, 0.0)
    tl.store(grad_ptr + row * grad_stride + lanes, g.to(grad_ptr.dtype.element_ty), mask=lanes < classes)


def _config(classes: int) -> Config:
    """Eight elements per thread and step, two 16-byte accesses of float32: a row is read at the rate of memory whatever
    the block, and wide rows take more warps to have as many bytes under way."""
    block = min(max(next_power_of_2(classes), 64), 4096)
    return Config({"BLOCK": block}, num_warps=max(1, min(block // 256, 16)), num_stages=2)


def _arguments(z: Tensor, present: Tensor | None, ignore_index: int, smoothing: float, q: float) -> tuple[Any, ...]:
    stride = 0 if present is None else present.stride(0) if present.dim() else 0
    return stride, ignore_index, smoothing, q


def _present(presence: Tensor | None, modality: int) -> Tensor | None:
    return None if presence is None else presence[..., modality]


def _kept(labels: Sequence[Tensor], modality: int) -> Tensor:
    return labels[modality if len(labels) > 1 else 0].contiguous()


def forward(a: Arguments, training: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, labels, weights, log_vars, presence, _, label_smoothing, ignore_index, robust, q, wide = a
    rows, count = logits[0].shape[0], len(logits)
    losses = logits[0].new_empty((count, rows), dtype=torch.float32)
    statistics = losses.new_empty((count, rows, 2))
    counts = []
    for i, z in enumerate(logits):
        y, present = _kept(labels, i), _present(presence, i)
        counts.append(reference.valid_rows(y, ignore_index, presence, i).sum())
        launch(
            _losses,
            (rows,),
            *(z, y, present, losses[i], statistics[i], None, z.shape[1], z.stride(0)),
            *_arguments(z, present, ignore_index, label_smoothing, q),
            config=_config(z.shape[1]),
            KIND=robust,
            SMOOTH=label_smoothing > 0,
        )
    sums = [reference.mean_loss(losses[i], n) for i, n in enumerate(counts)]
    total, means = reference.combined(sums, counts, weights, log_vars)
    outputs = (total, means) if wide else (total.to(logits[0].dtype), means.to(logits[0].dtype))
    if not training:
        return *outputs, losses.new_empty(0), losses.new_empty(0)
    return *outputs, statistics, means.clone()


def backward(grads: Sequence[Tensor], a: Arguments, saved: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    logits, labels, weights, log_vars, presence, modulation, label_smoothing, ignore_index, robust, q, _ = a
    of_total, of_means = (g.float() for g in grads)
    statistics, means = saved[0].contiguous(), saved[1]
    count, rows = len(logits), logits[0].shape[0]
    counts = torch.stack(
        [reference.valid_rows(_kept(labels, i), ignore_index, presence, i).sum() for i in range(count)]
    )
    if log_vars is not None:
        factors = torch.exp(-log_vars.float())
    else:
        factors = torch.ones_like(means) if weights is None else weights.float()
    scales = of_total * factors + of_means
    if modulation is not None:
        scales = scales * modulation.float()
    scales = scales / counts.clamp(min=1)

    def empty() -> Tensor:
        return of_total.new_empty(0)

    results = []
    for i, z in enumerate(logits):
        if not needed[i]:
            results.append(empty())
            continue
        grad = torch.empty_like(z, memory_format=torch.contiguous_format)
        config, present = _config(z.shape[1]), _present(presence, i)
        launch(
            _gradient,
            (rows, ceil_div(z.shape[1], config.constants["BLOCK"])),
            *(z, _kept(labels, i), present, statistics[i], None, scales[i], grad),
            *(z.shape[1], z.stride(0), z.shape[1]),
            *_arguments(z, present, ignore_index, label_smoothing, q),
            config=config,
            KIND=robust,
            SMOOTH=label_smoothing > 0,
        )
        results.append(grad)
    results += [empty() for _ in labels]
    of_weights, of_log_vars, _, of_modulation = needed[count + len(labels) :]
    slopes = of_total * torch.where(counts > 0, means if log_vars is None else 1 - factors * means, 0)
    results.append(slopes.to(weights.dtype) if weights is not None and of_weights else empty())
    results.append(slopes.to(log_vars.dtype) if log_vars is not None and of_log_vars else empty())
    results.append(empty())
    results.append(torch.zeros_like(modulation) if modulation is not None and of_modulation else empty())
    return results


def rows_in_place(
    z: Tensor, labels: Tensor, label_smoothing: float, robust: str | None, q: float, gradient: bool, losses: Tensor
) -> None:
    """As ``torch.ops.mmkernels._cross_entropy_rows``: losses of rows whose label is not −1, whose logits become their
    gradients."""
    rows, classes = z.shape
    statistics, factors = losses.new_empty((rows, 2)), losses.new_empty(rows)
    config = _config(classes)
    options: dict[str, Any] = dict(config=config, KIND=robust, SMOOTH=label_smoothing > 0)
    rest = _arguments(z, None, -1, label_smoothing, q)
    launch(_losses, (rows,), z, labels, None, losses, statistics, factors, classes, z.stride(0), *rest, **options)
    if gradient:
        grid = (rows, ceil_div(classes, config.constants["BLOCK"]))
        strides = (classes, z.stride(0), z.stride(0))
        launch(_gradient, grid, z, labels, None, statistics, factors, None, z, *strides, *rest, **options)


def linear_forward(*args: Any) -> Any:
    return linear.forward(rows_in_place, *args)


def linear_backward(*args: Any) -> list[Tensor]:
    return linear.backward(rows_in_place, *args)


def calls(new: Callable[..., Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Heads of few and of many classes, every loss, and a vocabulary from hidden states."""
    import mmkernels as mmk

    def call(rows: int, classes: int, **options: Any) -> Callable[[], Any]:
        logits = [new(rows, classes) for _ in range(2)]
        labels = new(rows, dtype=torch.int64)
        return lambda: mmk.multimodal_cross_entropy(logits, labels, **options)

    yield "2 of 1024x8000", call(1024, 8000)
    yield (
        "2 of 4096x1000, smoothed, some absent",
        call(4096, 1000, label_smoothing=0.1, presence=new(4096, 2, dtype=torch.bool)),
    )
    yield "2 of 4096x10, gce", call(4096, 10, robust="gce")
    yield "2 of 1024x1000, symmetric", call(1024, 1000, robust="symmetric")
    hidden, head = new(4096, 512), new(32000, 512)
    labels = new(4096, dtype=torch.int64)
    yield "4096x512 to 32000", lambda: mmk.multimodal_cross_entropy([hidden], labels, linear=[(head, None)])
