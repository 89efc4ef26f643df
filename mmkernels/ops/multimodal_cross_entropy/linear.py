"""The cross-entropy of the logits that a linear head makes of hidden states, without ever holding them.

Rows are taken chunk by chunk: torch's product makes a chunk's logits in one buffer, a kernel takes their losses and
turns them into their gradients in place, and torch's products make of these what is added to the gradients of hidden
states and head. So the gradients are made in the forward, for an upstream gradient of one and before the division by
the number of rows, and scaled in the backward, as in Liger Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import kernel_vjp
from mmkernels._differentiable import DifferentiableOp, NativeKernels, TritonKernels
from mmkernels.ops import _checks as checks
from mmkernels.ops import _products as products
from mmkernels.ops.multimodal_cross_entropy import reference

_CHUNK_BYTES = 32 << 20  # of logits: products of some hundred rows are as quick as of all
_FEWEST_ROWS = 32


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    of_hidden, of_weight, of_bias = rest[-3:]
    loss = hidden.new_empty((), dtype=_wide(hidden))
    return (
        loss,
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else hidden.new_empty(0),
        loss.new_empty(weight.shape if of_weight else 0),
        loss.new_empty(weight.shape[0] if of_bias else 0),
        loss.new_empty(()),
    )


def _chunk_rows(rows: int, classes: int, itemsize: int) -> int:
    return max(1, min(rows, max(_FEWEST_ROWS, _CHUNK_BYTES // max(classes * itemsize, 1) // 16 * 16)))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b."""
    if a.dtype in (torch.bfloat16, torch.float16) and any(n % 2 for n in (*a.shape, b.shape[1])):
        out.copy_(products.matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def _add_product(to: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """to += a @ b, or to = a @ b at first; ``to`` is float32."""
    if a.dtype == to.dtype:
        torch.addmm(to, a, b, beta=0 if first else 1, out=to)
    elif first:
        to.copy_(products.matmul(a, b))
    else:
        to.add_(products.matmul(a, b))


def _check_range(labels: Tensor, classes: int) -> None:
    if labels.numel() and (labels.min() < 0 or labels.max() >= classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        name = "multimodal_cross_entropy"
        raise checks.value_error(name, "labels", f"labels from 0 to {classes - 1}, or ignore_index", wrong)


@torch.no_grad()
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
    of_hidden: bool,
    of_weight: bool,
    of_bias: bool,
    training: bool,
) -> tuple[Tensor, ...]:
    """``rows_in_place`` is ``torch.ops.mmkernels._cross_entropy_rows`` or does what it does.

    On the CPU rows that are not valid take no part; elsewhere, where asking for them would wait for the device, they do
    with zeros.
    """
    rows, classes = hidden.shape[0], weight.shape[0]
    on_cpu = hidden.is_cpu
    kept = None  # which rows are valid, where some are not
    if not on_cpu:
        labels = labels.masked_fill(~valid, -1)
    elif not bool(valid.all()):
        kept = valid.nonzero().squeeze(1)
        rows, labels = kept.shape[0], labels.index_select(0, kept)
    labels = labels.contiguous()
    if on_cpu:
        _check_range(labels, classes)
    of_hidden, of_weight, of_bias = (training and f for f in (of_hidden, of_weight, of_bias))
    flags = (of_hidden, of_weight, of_bias)
    loss, grad_hidden, grad_weight, grad_bias, count = _fake(hidden, weight, bias, *flags)
    if rows == 0 or kept is not None:
        grad_hidden.zero_()
    if rows == 0:
        grad_weight.zero_()
    grad_bias.zero_()
    losses = loss.new_empty(rows)
    chunk = _chunk_rows(rows, classes, hidden.element_size())
    buffer = hidden.new_empty((chunk, classes))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        x = hidden[start:stop] if kept is None else hidden.index_select(0, kept[start:stop])
        if not on_cpu:
            x = x.masked_fill(~valid[start:stop].unsqueeze(1), 0)
        z = buffer[: stop - start]
        _multiply(x, weight.t(), z)
        if bias is not None:
            z.add_(bias)
        rows_in_place(z, labels[start:stop], label_smoothing, robust, q, any(flags), losses[start:stop])
        if of_hidden and kept is None:
            _multiply(z, weight, grad_hidden[start:stop])
        elif of_hidden:
            grad_hidden.index_copy_(0, kept[start:stop], products.matmul(z, weight))  # type: ignore[index]
        if of_weight:
            _add_product(grad_weight, z.t(), x, start == 0)
        if of_bias:
            grad_bias.add_(z.sum(0, dtype=grad_bias.dtype))
    count.copy_(valid.sum())
    loss.copy_(losses.sum(dtype=torch.float64) / count.clamp(min=1))
    return loss, grad_hidden, grad_weight, grad_bias, count


def backward(rows_in_place: Callable[..., None], grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *args, saved, needed = rest
    hidden, weight, bias, _, _, modulation = args[:6]
    leaves = (hidden, weight, bias)
    made, count = saved[:3], saved[3]
    if any(n and g.numel() != x.numel() for n, g, x in zip(needed[:3], made, leaves, strict=True) if x is not None):
        # The forward did not know that they would be asked for.
        _, *made, count = forward(rows_in_place, *args[:9], *needed[:3], True)  # type: ignore[call-arg]
    scale = grads[0].to(count.dtype) / count.clamp(min=1)
    if modulation is not None:
        scale = scale * modulation.to(scale.dtype)

    def empty() -> Tensor:
        return grads[0].new_empty(0)

    pulled = [
        (g * scale).to(x.dtype) if n and x is not None else empty()
        for g, x, n in zip(made, leaves, needed[:3], strict=True)
    ]
    of_modulation = torch.zeros_like(modulation) if modulation is not None and needed[5] else empty()
    return [*pulled, empty(), empty(), of_modulation]


def _reference_saved(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: Tensor, _: Any, *options: Any
) -> tuple[Tensor, ...]:
    *of_loss, of_hidden, of_weight, of_bias = options
    flags = (of_hidden, of_weight, of_bias)
    leaves = [None if x is None else x.detach() for x in (hidden, weight, bias)]

    def mean(*needed: Tensor | None) -> tuple[Tensor]:
        full = [x if new is None else new for new, x in zip(needed, leaves, strict=True)]
        return (reference.linear_cross_entropy(full[0], full[1], full[2], labels, valid, None, *of_loss),)  # type: ignore[arg-type]

    _, *saved, count = _fake(hidden.detach(), weight.detach(), bias, *flags)
    count.copy_(valid.sum())
    if not any(flags):
        return *saved, count
    wanted = [x if flag else None for x, flag in zip(leaves, flags, strict=True)]
    for to, gradient in zip(saved, kernel_vjp(mean, wanted, [count.clamp(min=1)]), strict=True):
        if gradient is not None:
            to.copy_(gradient)
    return *saved, count


def _compiled_rows(*args: Any) -> None:
    torch.ops.mmkernels._cross_entropy_rows(*args)


linear_op = DifferentiableOp(
    "multimodal_cross_entropy_linear",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor valid, Tensor? modulation, "
    "float label_smoothing, str? robust, float q, bool of_hidden, bool of_weight, bool of_bias",
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
