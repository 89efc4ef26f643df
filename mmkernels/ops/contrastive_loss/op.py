"""Registration of contrastive_loss: schema, shapes of its output, backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels._arguments import SymInt
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops._contrastive import accumulation_dtype
from mmkernels.ops.contrastive_loss import reference


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    logit_scale: Tensor
    row_labels: Tensor | None
    column_labels: Tensor | None
    label_smoothing: float
    symmetric: bool
    first_target: SymInt
    total: SymInt
    keeps_products: bool


def _contrastive_loss_fake(a: Arguments) -> tuple[Tensor, ...]:
    x, y, symmetric, keeps_products = a.x, a.y, a.symmetric, a.keeps_products
    wide = accumulation_dtype(x)
    loss = x.new_empty((), dtype=wide)
    of_columns = (2, y.shape[0]) if symmetric else (0,)
    products = x.new_empty((x.shape[0], y.shape[0]) if keeps_products else 0)
    return loss, x.new_empty((2, x.shape[0]), dtype=wide), x.new_empty(of_columns, dtype=wide), products


contrastive_loss_op = DifferentiableOp(
    "contrastive_loss",
    Arguments,
    outputs="Tensor loss",
    # [2, rows]: the maximum of the products, negated where the scale is below 0, and Σ e^(z − its logit). Not that
    # of z: distances are taken before anything is rounded, so that no contraction can spoil them.
    # The products themselves, [n, N], for a caller to whom they are small.
    saved="Tensor row_stats, Tensor column_stats, Tensor products",
    reference=reference.contrastive_loss,
    reference_saved=reference.softmax_stats,
    fake=_contrastive_loss_fake,
    triton=TritonKernels(),
)
