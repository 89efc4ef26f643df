"""The norm of a row of features as the row ops have it: its formula and the checks of its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _checks as checks

NORMS = (None, "layer", "rms")  # in the order of Norm of csrc/cuda/rows.cuh


def normalize(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """norm(x) · weight + bias over the last dim; with norm None, x itself."""
    if norm is None or x.numel() == 0:
        return x
    if norm == "layer":
        return layer_norm(x, weight, bias, eps)
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's, and what it is made of where there may be tangents: torch's are wrong once they are differentiated,
    which takes the mean and the deviation in them for constants."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(x.dtype)


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
