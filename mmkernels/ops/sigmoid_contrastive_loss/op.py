"""Registration of sigmoid_contrastive_loss: schema, shapes of its output, backends."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from mmkernels._arguments import SymInt
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kernels import TritonKernels
from mmkernels.ops._contrastive import accumulation_dtype
from mmkernels.ops.sigmoid_contrastive_loss import reference


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    first_target: SymInt
    total: SymInt
    of_x: bool
    of_y: bool


def _sigmoid_contrastive_loss_fake(a: Arguments) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(a.x)
    shapes: tuple[Any, ...] = ((), a.x.shape if a.of_x else (0,), a.y.shape if a.of_y else (0,), (2,))
    return tuple(a.x.new_empty(shape, dtype=wide) for shape in shapes)


sigmoid_contrastive_loss_op = DifferentiableOp(
    "sigmoid_contrastive_loss",
    Arguments,
    outputs="Tensor loss",
    # Gradients of the loss, [n, D] and [N, D], each where it is wanted, and of scale and bias, [2], float32: they need
    # no sums over a row, so that the forward makes them of the logits at hand, and the backward multiplies them by what
    # comes.
    saved="Tensor x_grad, Tensor y_grad, Tensor scalar_grads",
    reference=reference.sigmoid_contrastive_loss,
    reference_saved=reference.unit_gradients,
    fake=_sigmoid_contrastive_loss_fake,
    triton=TritonKernels(),
)
