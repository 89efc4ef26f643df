"""Losses of the logits that linear heads make of hidden states, without ever holding them.

Rows are taken chunk by chunk: torch's product makes a chunk's logits in a buffer of each head, a kernel takes the
losses of its rows and turns logits into their gradients in place, and torch's products make of these what is added to
the gradients of hidden states and heads. So the gradients are made in the forward, for an upstream gradient of one and
before the division by the number of rows, and scaled in the backward, as in Liger Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import kernel_vjp
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _products as products
from mmkernels.ops._contrastive import PLAIN

Head = tuple[Tensor, Tensor | None]  # weight [C, D] and bias [C]
Source = tuple[Tensor, Tensor, Tensor | None]  # hidden states [B, D] and their head; three flags say what is wanted

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK_BYTES = 32 << 20  # of one head's logits: products of some hundred rows are as quick as of all
_FEWEST_ROWS = 32


def heads_in(op: str, linear: Any, count: int, each: str) -> list[Head]:
    """The pairs of weight and bias, one for ``each``."""
    if not isinstance(linear, (list, tuple)):
        raise checks.type_error(op, "linear", "a list of pairs (weight, bias or None)", type(linear).__name__)
    if len(linear) != count:
        raise checks.value_error(op, "linear", f"{count} heads, one for {each}", len(linear))
    for i, head in enumerate(linear):
        if not isinstance(head, (list, tuple)) or len(head) != 2:
            got = type(head).__name__ if not isinstance(head, (list, tuple)) else f"{len(head)} elements"
            raise checks.type_error(op, f"linear[{i}]", "a pair (weight, bias or None)", got)
    return [(weight, bias) for weight, bias in linear]


def check_heads(op: str, heads: Sequence[Head], hidden: Sequence[Tensor], first_name: str) -> list[int]:
    """The number of classes of every head; the first of the hidden states has a name."""
    first = hidden[0]
    for i, ((weight, bias), x) in enumerate(zip(heads, hidden, strict=True)):
        name = f"linear[{i}]"
        checks.check_tensor(op, f"{name}[0]", weight)
        checks.check_same_kind(op, first, first_name, **{f"{name}[0]": weight})
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            expected = f"shape {fusion.shape_text(('C', x.shape[-1]))}"
            raise checks.value_error(op, f"{name}[0]", expected, tuple(weight.shape))
        if bias is not None:
            fusion.check_shaped(op, f"{name}[1]", bias, (weight.shape[0],), first, first_name)
    return [weight.shape[0] for weight, _ in heads]


def small_logits(hidden: Sequence[Any], linear: Any, valid: Callable[[int], Any]) -> list[Tensor] | None:
    """The logits of a plain eager call on the CPU that fit into one chunk together, of what nobody has checked; None of
    others. To have them costs less then than to set up chunks.

    Args:
        hidden, linear: [B, D] and the heads.
        valid: of the i-th hidden states which rows count, [B] bool, or None where all do. The others may hold NaN: no
            loss reads their logits, but a gradient of the head would read them.
    """
    if not isinstance(linear, (list, tuple)) or len(linear) != len(hidden):
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return None
    size = 0
    for x, head in zip(hidden, linear, strict=True):
        if not isinstance(head, (list, tuple)) or len(head) != 2:
            return None
        weight, bias = head
        given = (x, weight) if bias is None else (x, weight, bias)
        if any(type(t) not in PLAIN or not t.is_cpu for t in given) or x.dtype not in _KERNEL_DTYPES:
            return None
        if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype is not x.dtype:
            return None
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
            return None
        size += x.shape[0] * weight.shape[0] * x.element_size()
    if size > _CHUNK_BYTES or checks.autocast_is_on(hidden[0].device) or torch._C._are_functorch_transforms_active():
        return None
    made = []
    for i, (x, (weight, bias)) in enumerate(zip(hidden, linear, strict=True)):
        rows = valid(i) if torch.is_grad_enabled() and weight.requires_grad else None
        if rows is not None and not bool(rows.all()):
            x = x.masked_fill(~rows.unsqueeze(1), 0)
        made.append(products.linear(x, weight, bias))
    return made


def fake(sources: Sequence[Source], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The loss, the gradients of every source, empty where they are not wanted, and how many rows count."""
    first = sources[0][0]
    loss = first.new_empty((), dtype=torch.promote_types(first.dtype, torch.float32))
    made: list[Tensor] = []
    for i, (hidden, weight, _) in enumerate(sources):
        of_hidden, of_weight, of_bias = wanted[3 * i : 3 * i + 3]
        made += [
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else hidden.new_empty(0),
            loss.new_empty(weight.shape if of_weight else 0),
            loss.new_empty(weight.shape[0] if of_bias else 0),
        ]
    return (loss, *made, loss.new_empty(()))


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


class _Chunks:
    """The logits of a source, and its gradients as the chunks add to them.

    ``kept`` are the rows that take part, all where it is None; rows that are not ``valid`` take part as zeros.
    """

    def __init__(
        self,
        source: Source,
        gradients: Sequence[Tensor],
        wanted: Sequence[bool],
        kept: Tensor | None,
        valid: Tensor | None,
        rows: int,
        chunk: int,
    ) -> None:
        self._hidden, self._weight, self._bias = source
        self._of_hidden, self._of_weight, self._of_bias = gradients
        self._wanted = wanted
        self._kept, self._valid = kept, valid
        self._buffer = self._hidden.new_empty((chunk, self._weight.shape[0]))
        if rows == 0 or kept is not None:
            self._of_hidden.zero_()
        if rows == 0:
            self._of_weight.zero_()
        self._of_bias.zero_()

    def logits(self, start: int, stop: int) -> Tensor:
        x = self._hidden[start:stop] if self._kept is None else self._hidden.index_select(0, self._kept[start:stop])
        if self._valid is not None:
            x = x.masked_fill(~self._valid[start:stop].unsqueeze(1), 0)
        z = self._buffer[: stop - start]
        _multiply(x, self._weight.t(), z)
        if self._bias is not None:
            z.add_(self._bias)
        self._x = x
        return z

    def pull(self, z: Tensor, start: int, stop: int) -> None:
        """Add what the gradients of the logits that were made last make."""
        of_hidden, of_weight, of_bias = self._wanted
        if of_hidden and self._kept is None:
            _multiply(z, self._weight, self._of_hidden[start:stop])
        elif of_hidden:
            self._of_hidden.index_copy_(0, self._kept[start:stop], products.matmul(z, self._weight))  # type: ignore[index]
        if of_weight:
            _add_product(self._of_weight, z.t(), self._x, start == 0)
        if of_bias:
            self._of_bias.add_(z.sum(0, dtype=self._of_bias.dtype))


@torch.no_grad()
def forward(
    rows_in_place: Callable[[list[Tensor], Tensor | None, list[bool], Tensor], None],
    sources: Sequence[Source],
    valid: Tensor | None,
    marks: Tensor | None,
    wanted: Sequence[bool],
    training: bool,
) -> tuple[Tensor, ...]:
    """What `fake` describes: the mean of the losses of valid rows, and gradients that are not divided by their number;
    all but the loss empty without ``training``.

    On the CPU rows that are not valid take no part; elsewhere, where asking for them would wait for the device, they do
    with zeros.

    Args:
        rows_in_place: is given a chunk's logits of every source, its part of ``marks``, whether the gradients of each
            of the logits are to come in their place, and where the losses of the rows go, 0 for those not valid.
        sources: of the same number of rows and classes.
        valid: [B] bool, or None where all rows are.
        marks: [B], what the kernel is told of each row.
        wanted: three flags for each source.
    """
    first, weight, _ = sources[0]
    rows, classes = first.shape[0], weight.shape[0]
    kept = None  # which rows are valid, where some are not
    if first.is_cpu and valid is not None:
        if not bool(valid.all()):
            kept = valid.nonzero().squeeze(1)
            rows = kept.shape[0]
            marks = None if marks is None else marks.index_select(0, kept)
        count, valid = rows, None
    else:
        count = rows if valid is None else valid.sum()  # type: ignore[assignment]
    if marks is not None:
        marks = marks.contiguous()
    wanted = [training and w for w in wanted]
    loss, *made, counted = fake(sources, wanted)
    chunk = _chunk_rows(rows, classes, first.element_size())
    flags = [wanted[3 * i : 3 * i + 3] for i in range(len(sources))]
    chunks = [
        _Chunks(source, made[3 * i : 3 * i + 3], flags[i], kept, valid, rows, chunk) for i, source in enumerate(sources)
    ]
    losses = loss.new_empty(rows)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        logits = [c.logits(start, stop) for c in chunks]
        of_rows = None if marks is None else marks[start:stop]
        rows_in_place(logits, of_rows, [any(f) for f in flags], losses[start:stop])
        for c, z in zip(chunks, logits, strict=True):
            c.pull(z, start, stop)
    counted.fill_(count)
    loss.copy_(losses.sum(dtype=torch.float64) / counted.clamp(min=1))
    return (loss, *made, counted if training else counted.new_empty(0))


def backward(
    again: Callable[[Sequence[bool]], tuple[Tensor, ...]],
    grad: Tensor,  # []
    leaves: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    needed: Sequence[bool],
    factor: Tensor | None = None,  # []
) -> list[Tensor]:
    """The gradients of the sources, times ``factor``, from what the forward saved; it runs ``again`` for those that it
    did not know would be needed."""
    *made, count = saved
    if any(n and x is not None and g.numel() != x.numel() for n, g, x in zip(needed, made, leaves, strict=True)):
        _, *made, count = again(needed)
    scale = grad.to(count.dtype) / count.clamp(min=1)
    if factor is not None:
        scale = scale * factor.to(scale.dtype)
    return [
        (g * scale).to(x.dtype) if n and x is not None else grad.new_empty(0)
        for g, x, n in zip(made, leaves, needed, strict=True)
    ]


def saved_by_reference(
    mean: Callable[..., Tensor], leaves: Sequence[Tensor | None], saved: Sequence[Tensor], count: Tensor | int
) -> tuple[Tensor, ...]:
    """What `forward` saves, from a loss in plain torch.

    Args:
        mean: the loss, a function of the leaves.
        leaves: hidden states, weight and bias of every source.
        saved: to be written: their gradients, empty where they are not wanted, and how many rows count.
        count: how many do.
    """
    *made, counted = saved
    counted.fill_(count)
    given = [None if x is None else x.detach() for x in leaves]
    wanted = [x if x is not None and g.numel() == x.numel() else None for x, g in zip(given, made, strict=True)]
    if all(x is None for x in wanted):
        return tuple(saved)

    def of_wanted(*some: Tensor | None) -> tuple[Tensor]:
        return (mean(*(x if new is None else new for new, x in zip(some, given, strict=True))),)

    for to, gradient in zip(made, kernel_vjp(of_wanted, wanted, [counted.clamp(min=1)]), strict=True):
        if gradient is not None:
            to.copy_(gradient)
    return tuple(saved)
