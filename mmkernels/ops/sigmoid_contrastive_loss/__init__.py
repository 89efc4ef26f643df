"""The sigmoid loss of paired embeddings, SigLIP's, without their matrix of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door, needs_grad
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _contrastive as contrastive
from mmkernels.ops.sigmoid_contrastive_loss.op import sigmoid_contrastive_loss_op

__all__ = ["sigmoid_contrastive_loss"]

_NAME = "sigmoid_contrastive_loss"


def sigmoid_contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    is_log_scale: bool = False,
    group: Any = None,
) -> Tensor:
    """Each x and y are told apart as a pair or none, one by one; the N × N logits are never held.

        loss = −(1 / N) Σ_ij log σ(l_ij · (logit_scale · x_i·y_j + logit_bias)),  l = 1 where i = j, −1 elsewhere

    The loss of SigLIP (Zhai et al., 2023, arXiv:2303.15343).

    Args:
        x: (N, D), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim that is not
            contiguous costs a copy. Used as it is: normalise it first where its cosine is meant.
        y: (N, D); x[i] and y[i] are a pair.
        logit_scale: the inverse temperature, a number or a tensor of shape () or (1,), of any floating dtype.
        logit_bias: the same; SigLIP starts at −10.
        is_log_scale: logit_scale is the logarithm of the scale, as models keep it: exp of it is used.
        group: a ``torch.distributed`` process group over whose ranks the batch is spread: x and y are this rank's
            rows of it, as many as it has, and none too. The loss is that of the whole batch, on every rank; gradients
            are those a single process would have, of this rank's rows, and the whole of a scalar's on every rank.
            All ranks make the call, and its backward, alike. None = this process has the whole batch.

    x and y have one dtype, all tensors one device. Under autocast x and y are cast as for a product. Gradients for x,
    y, logit_scale and logit_bias; where one is recorded the forward makes those that are and keeps those of x and y, of
    their own size in float32. Products and sums are accumulated in float32 (float64 for float64) in a fixed order.

    Returns:
        The loss (), in the dtype of x; under autocast float32. 0 of no pairs.

    Example:
        >>> image, text = (F.normalize(torch.randn(256, 512), dim=-1) for _ in range(2))
        >>> sigmoid_contrastive_loss(image, text, 10.0, -10.0).shape
        torch.Size([])
    """
    if (
        group is None
        and type(is_log_scale) is bool
        and type(x) in contrastive.PLAIN
        and may_use_door()
        and (scale := contrastive.plain_scalar(logit_scale, is_log=is_log_scale)) is not None
        and (bias := contrastive.plain_scalar(logit_bias)) is not None
    ):
        wanted = x.requires_grad, type(y) in contrastive.PLAIN and y.requires_grad
        out = sigmoid_contrastive_loss_op.unchecked(x, y, scale, bias, 0, x.shape[0] if x.dim() else 0, *wanted)
        if out is not None:
            return out if x.dtype is torch.float32 else out.to(x.dtype)
    if is_overridden(x, y, logit_scale, logit_bias):
        return overridden_call(sigmoid_contrastive_loss, locals())
    x, y = contrastive.check_pairs(_NAME, x, y)
    is_log = contrastive.check_flag(_NAME, "is_log_scale", is_log_scale)
    scale = contrastive.scalar(_NAME, "logit_scale", logit_scale, x, is_log=is_log)
    bias = contrastive.scalar(_NAME, "logit_bias", logit_bias, x)
    if group is not None:
        from mmkernels.distributed import contrastive as spread

        return contrastive.result(spread.sigmoid_contrastive_loss(x, y, scale, bias, group), x)
    loss = sigmoid_contrastive_loss_op(x, y, scale, bias, 0, x.shape[0], needs_grad(x), needs_grad(y))[0]
    return contrastive.result(loss, x)
