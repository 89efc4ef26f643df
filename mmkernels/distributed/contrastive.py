"""The contrastive losses over a global batch: features travel, logits never do.

By one gather of each side; or, as the sigmoid loss is a sum over pairs, for a y that is large by the ring of its paper
(Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, arXiv:2303.15343, section 3.3): a rank then holds
the rows of two others at most, and the sums of their gradients follow them home.

A rank has its rows of x and y. It computes the part of the loss that these rows are the rows of, against all of the
other side, and the parts are added up. The loss has one value on every rank; each rank's gradients are those that a
single process with the whole batch would have: of its own rows of x and y, and the whole of scale and bias. These
gradients are differentiable no further.

What averages gradients over the ranks, as DistributedDataParallel does, makes of the encoders' parameters, whose
gradients are to be added up, a world-size-th; multiply the loss by the world size, and the gradients of scale and bias,
which each rank has in whole, by its inverse. What adds gradients up needs the latter alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels._dispatch import needs_grad
from mmkernels.distributed.collectives import Batch
from mmkernels.distributed.parts import GATHERED_BYTES, Ring
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op


@torch.compiler.disable  # ranks tell one another of the call before it is clear what there is to compute
def contrastive_loss(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [n, D]
    logit_scale: Tensor,  # [], the same on every rank
    labels: Tensor | None,  # [n]
    label_smoothing: float,
    group: Any,
) -> Tensor:
    """Rows of x over all y, and of y over all x: loss [], float32 or float64."""
    batch = Batch("contrastive_loss", x, (x, y, logit_scale, labels), group)
    scale = batch.shared(logit_scale)
    all_labels = None if labels is None else batch.gather(labels)
    part = None
    for rows, others in ((x, y), (y, x)):
        columns, place = batch.gather(others), (batch.first, batch.total)
        (rows_part,) = contrastive_loss_op(
            rows, columns, scale, labels, all_labels, label_smoothing, False, *place, False
        )
        part = rows_part if part is None else part + rows_part
    assert part is not None
    return batch.sum(part)


@torch.compiler.disable
def sigmoid_contrastive_loss(
    x: Tensor,  # [n, D], this rank's
    y: Tensor,  # [n, D]
    logit_scale: Tensor,  # [], the same on every rank
    logit_bias: Tensor,  # []
    group: Any,
) -> Tensor:
    """Rows of x over all y: loss [], float32 or float64."""
    batch = Batch("sigmoid_contrastive_loss", x, (x, y, logit_scale, logit_bias), group)
    scale, bias = batch.shared(logit_scale), batch.shared(logit_bias)
    if len(batch.counts) > 1 and batch.total * y.shape[1] * y.element_size() > GATHERED_BYTES:
        return batch.sum(_AroundRing.apply(batch, x, y, scale, bias))
    all_y = batch.gather(y)
    wanted = needs_grad(x), needs_grad(all_y)
    (part,) = sigmoid_contrastive_loss_op(x, all_y, scale, bias, batch.first, batch.total, *wanted)
    return batch.sum(part)


class _AroundRing(torch.autograd.Function):
    """The part of the sigmoid loss that this rank's rows of x have, against the rows of y as they come by.

    The gradients, which are the loss's but for a factor, are made beside it, and nothing travels in the backward.
    """

    @staticmethod
    def forward(ctx: Any, batch: Batch, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        features = x.shape[1]
        loss = torch.zeros_like(scale)
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (x, y, scale, bias)]
        ring = Ring(batch.op, batch.group, [count * features for count in batch.counts])
        for parts in ring.parts(y.reshape(-1)):
            ((source, part),) = parts.items()
            rows = part.view(-1, features)
            pairs = 0 if source == batch.rank else rows.shape[0]  # the column of row 0's pair, or beyond all columns
            with torch.enable_grad():
                leaves = [
                    t.detach().requires_grad_(need) for t, need in zip((x, rows, scale, bias), needs, strict=True)
                ]
                (here,) = sigmoid_contrastive_loss_op(*leaves, pairs, batch.total, needs[0], needs[1])
            loss += here.detach()
            wanted = [i for i, t in enumerate(leaves) if t.requires_grad]
            found = torch.autograd.grad(here, [leaves[i] for i in wanted]) if wanted else ()
            for i, gradient in zip(wanted, found, strict=True):
                if i == 1:  # of the rows of y, on their way home
                    ring.add({source: gradient.to(sums[1].dtype).reshape(-1)})
                else:
                    sums[i] += gradient
        if needs[1]:
            sums[1] = ring.own_sum().view_as(y)
        ctx.save_for_backward(*(total if need else None for total, need in zip(sums, needs, strict=True)))
        ctx.dtypes = [t.dtype for t in (x, y, scale, bias)]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (None, *(None if total is None else (total * grad).to(dtype) for total, dtype in saved))
