"""What the contrastive losses check and share: two sides of paired embeddings, and scalars of their logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks


def check_pairs(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides (N, D), cast where autocast asks for it."""
    checks.check_tensor(op, "x", x)
    checks.check_tensor(op, "y", y)
    if checks.autocast_is_on(x.device):
        x, y = checks.autocast_inputs(x.device, x, y)
    if x.dtype not in checks.FLOATING:
        raise checks.type_error(op, "x", "dtype float32, bfloat16, float16 or float64", x.dtype)
    if x.dim() != 2:
        raise checks.value_error(op, "x", "2 dims (N, D)", f"shape {tuple(x.shape)}")
    checks.check_same_kind(op, x, "x", y=y)
    if y.shape != x.shape:
        raise checks.value_error(op, "y", f"shape {tuple(x.shape)}, that of x", tuple(y.shape))
    checks.check_count(op, "y", "logits", x.shape[0], y.shape[0])
    return x, y


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scalar(op: str, argument: str, value: Any, x: Tensor, *, is_log: bool = False) -> Tensor:
    """A number, or a tensor of one element, as one without dims in the dtype that sums have; of its logarithm exp."""
    dtype = accumulation_dtype(x)
    if not isinstance(value, Tensor):
        number = checks.check_number(op, argument, value)
        largest = torch.finfo(dtype).max
        if math.log(largest) < number < math.inf if is_log else largest < abs(number) < math.inf:
            what = "a logarithm whose exponential is" if is_log else "a number"
            raise checks.value_error(op, argument, f"{what} in the range of {dtype}", number)
        return torch.full((), math.exp(number) if is_log else number, dtype=dtype, device=x.device)
    checks.check_tensor(op, argument, value)
    if value.dtype not in checks.FLOATING:
        raise checks.type_error(op, argument, "a number, or a tensor of a floating dtype", value.dtype)
    checks.check_same_device(op, argument, value, "x", x.device)
    if value.dim() > 1 or value.numel() != 1:
        raise checks.value_error(op, argument, "a number, or a tensor of shape () or (1,)", tuple(value.shape))
    value = value.reshape(()).to(dtype)
    return value.exp() if is_log else value


PLAIN = (Tensor, torch.nn.Parameter)
_SCALARS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
_LARGEST_LOG = 80.0  # whose exponential is a float32


def plain_scalar(value: Any, *, is_log: Any = False) -> Tensor | None:
    """As `scalar`, of what nobody has checked; None of what the door would not take."""
    if type(value) in PLAIN:
        if value.dtype not in _SCALARS or value.dim() > 1 or value.numel() != 1:
            return None
        if value.dim() == 1:
            value = value.reshape(())
        if value.dtype is not torch.float32:
            value = value.float()
        return value.exp() if is_log is True else value
    if type(value) is not float or not -_LARGEST <= value <= (_LARGEST_LOG if is_log is True else _LARGEST):
        return None
    return torch.scalar_tensor(math.exp(value) if is_log is True else value, dtype=torch.float32, device="cpu")


def check_flag(op: str, argument: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise checks.type_error(op, argument, "a bool", type(value).__name__)
    return value


def result(loss: Tensor, x: Tensor) -> Tensor:
    """The loss in the dtype of the logits, or under autocast, where losses are float32, as it is."""
    return loss if checks.autocast_is_on(x.device) else loss.to(x.dtype)
