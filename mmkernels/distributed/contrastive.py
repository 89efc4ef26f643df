"""The contrastive losses over a global batch: features travel, by one gather of each side, logits never do.

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

from torch import Tensor

from mmkernels._dispatch import needs_grad
from mmkernels.distributed.collectives import Batch
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op


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
    all_y = batch.gather(y)
    wanted = needs_grad(x), needs_grad(all_y)
    (part,) = sigmoid_contrastive_loss_op(x, all_y, scale, bias, batch.first, batch.total, *wanted)
    return batch.sum(part)
