"""The norm of a row of features as the row ops have it: its formula and the checks of its arguments."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops import _checks as checks

NORMS = (None, "layer", "rms")  # in the order of Norm of csrc/cuda/rows.cuh


def normalize(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """norm(x) · weight + bias over the last dim; with norm None, x itself."""
    if norm is None or x.numel() == 0:
        return x
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def check_norm(
    op: str, norm: object, weight: Tensor | None, bias: Tensor | None, eps: float, features: int, like: Tensor
) -> float:
    """eps, once all fit each other and rows of ``features`` features in the dtype and on the device of ``like``."""
    if norm not in NORMS:
        raise checks.value_error(op, "norm", "None, 'layer' or 'rms'", repr(norm))
    eps = checks.check_number(op, "eps", eps)
    for argument, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if tensor is None:
            continue
        checks.check_tensor(op, argument, tensor)
        if norm is None:
            raise checks.value_error(op, argument, "None where norm=None", f"shape {tuple(tensor.shape)}")
        if tensor.dim() != 1 or tensor.shape[0] != features:
            raise checks.value_error(op, argument, f"shape ({features},)", tuple(tensor.shape))
        checks.check_same_kind(op, like, "the tokens", **{argument: tensor})
    return eps
