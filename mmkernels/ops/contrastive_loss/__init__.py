"""The symmetric contrastive loss of paired embeddings, CLIP's, without their matrix of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels import _native
from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _contrastive as contrastive
from mmkernels.ops._labels import check_labels
from mmkernels.ops.contrastive_loss.op import contrastive_loss_op

__all__ = ["contrastive_loss"]

_NAME = "contrastive_loss"


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    is_log_scale: bool = False,
    group: Any = None,
) -> Tensor:
    """Every x tells its own y from all others, and every y its x; the N × N logits of a large batch are never held.

        z = logit_scale · x yᵀ,  loss = ½ (CE(z, i) + CE(zᵀ, i)),  CE the mean over rows of cross-entropies

    The loss of CLIP (Radford et al., 2021, arXiv:2103.00020), InfoNCE in both directions. With ``labels`` that of UniCL
    (Yang et al., 2022, arXiv:2204.03610): a row's target is shared by its positives, the rows of the same label, so
    that its loss is the mean of their −log p, in both directions.

    Args:
        x: (N, D), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim that is not
            contiguous costs a copy. Used as it is: normalise it first where its cosine is meant.
        y: (N, D); x[i] and y[i] are a pair.
        logit_scale: the inverse temperature, a number or a tensor of shape () or (1,), of any floating dtype.
        labels: (N,) integers: pairs of one label are positives of each other. None = each of itself alone.
        label_smoothing: the share in 0 … 1 of a row's target that is spread over all of its N logits.
        is_log_scale: logit_scale is the logarithm of the scale, as models keep it: exp of it is used.
        group: a ``torch.distributed`` process group over whose ranks the batch is spread: x and y are this rank's
            rows of it, as many as it has, and none too. The loss is that of the whole batch, on every rank; gradients
            are those a single process would have, of this rank's rows, and the whole of a scalar's on every rank.
            All ranks make the call, and its backward, alike. None = this process has the whole batch.

    x and y have one dtype, all tensors one device. Under autocast x and y are cast as for a product. Gradients for x, y
    and logit_scale. Products and sums are accumulated in float32 (float64 for float64) in a fixed order. For the
    backward two numbers of each row and column are kept, and on the CPU the products of all pairs where they are no
    larger than x and y together.

    Returns:
        The loss (), in the dtype of x; under autocast float32. 0 of no pairs.

    Example:
        >>> image, text = (F.normalize(torch.randn(256, 512), dim=-1) for _ in range(2))
        >>> contrastive_loss(image, text, 100.0).shape
        torch.Size([])
    """
    if (
        group is None
        and type(is_log_scale) is bool
        and type(label_smoothing) is float
        and type(x) in contrastive.PLAIN
        and may_use_door()
        and (scale := contrastive.plain_scalar(logit_scale, is_log=is_log_scale)) is not None
    ):
        rows = x.shape[0] if x.dim() else 0
        keeps = _keeps_products(x)
        out = contrastive_loss_op.unchecked(x, y, scale, labels, labels, label_smoothing, True, 0, rows, keeps)
        if out is not None:
            return out if x.dtype is torch.float32 else out.to(x.dtype)
    if is_overridden(x, y, logit_scale, labels):
        return overridden_call(contrastive_loss, locals())
    x, y = contrastive.check_pairs(_NAME, x, y)
    is_log = contrastive.check_flag(_NAME, "is_log_scale", is_log_scale)
    scale = contrastive.scalar(_NAME, "logit_scale", logit_scale, x, is_log=is_log)
    if labels is not None:
        labels = check_labels(_NAME, "labels", labels, x.shape[:1], x, "x")
    smoothing = checks.check_number(_NAME, "label_smoothing", label_smoothing)
    if not 0.0 <= smoothing <= 1.0:
        raise checks.value_error(_NAME, "label_smoothing", "a number in 0 … 1", smoothing)
    if group is not None:
        from mmkernels.distributed import contrastive as spread

        return contrastive.result(spread.contrastive_loss(x, y, scale, labels, smoothing, group), x)
    keeps = not torch.compiler.is_compiling() and _keeps_products(x)
    loss = contrastive_loss_op(x, y, scale, labels, labels, smoothing, True, 0, x.shape[0], keeps)[0]
    return contrastive.result(loss, x)


def _keeps_products(x: Tensor) -> bool:
    """Whether the backward is given all products: where they are no more than x and y are, it costs less than to make
    them again."""
    if not x.is_cpu or x.dim() != 2:
        return False
    pairs, features = x.shape
    if type(pairs) is not int or not pairs <= 2 * features:
        return False
    if x.dtype is torch.float32:
        return True
    # Products in half precision are padded to even sizes; of few, or where the core has none of them, float32 ones are
    # made. Cores that multiply bfloat16 need not multiply float16.
    many = pairs * pairs * features > 1 << 20
    return x.dtype is torch.bfloat16 and pairs % 2 == 0 and many and _native.has_bf16_products()
