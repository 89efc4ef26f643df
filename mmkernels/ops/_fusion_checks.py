"""Argument checks that the fusion ops share: lists of modalities, their weights, presence and activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks
from mmkernels.ops._rows import as_rows

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu"]
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "quick_gelu")


def first_source(op: str, xs: Sequence[Tensor], argument: str = "xs") -> Tensor:
    """The first modality, once ``xs`` is a list or tuple that begins with a tensor."""
    if not isinstance(xs, (list, tuple)):
        raise checks.type_error(op, argument, "a list of tensors", type(xs).__name__)
    if not xs:
        raise checks.value_error(op, argument, "at least one tensor", "an empty list")
    first = xs[0]
    checks.check_tensor(op, f"{argument}[0]", first)
    return first


def autocast(device: torch.device, *values: Any) -> list[Any]:
    """As `_checks.autocast_inputs`, for tensors, lists of them, and whatever else, which stays as it is."""
    return [
        autocast(device, *value)
        if isinstance(value, (list, tuple))
        else checks.autocast_inputs(device, value)[0]
        if isinstance(value, Tensor)
        else value
        for value in values
    ]


def check_sources(op: str, xs: Sequence[Tensor]) -> tuple[torch.Size, int]:
    """The leading shape that all modalities share, and K, the sum of their widths."""
    first = xs[0]
    dtype, device, lead = first.dtype, first.device, first.shape[:-1]
    if dtype not in checks.FLOATING:
        raise checks.type_error(op, "xs[0]", "dtype float32, bfloat16, float16 or float64", dtype)
    width = 0
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor) or x.dtype != dtype or x.device != device:
            checks.check_tensor(op, f"xs[{i}]", x)
            check_kind(op, f"xs[{i}]", x, first)
        shape = x.shape
        if not shape:
            raise checks.value_error(op, f"xs[{i}]", "at least 1 dim (*, K_i)", "a scalar")
        if shape[:-1] != lead:
            expected = f"shape {shape_text((*lead, f'K_{i + 1}'))}, the leading dims of xs[0]"
            raise checks.value_error(op, f"xs[{i}]", expected, tuple(shape))
        width += shape[-1]
    return lead, width


def check_kind(op: str, argument: str, value: Tensor, first: Tensor, first_name: str = "xs[0]") -> None:
    """``value`` has the dtype and the device of the first modality."""
    checks.check_same_kind(op, first, first_name, **{argument: value})


def has_shape(value: Tensor, shape: Sequence[int]) -> bool:
    """Whether that is its shape. Sizes are compared only where there are as many, since a comparison of a symbolic size
    with another argument's binds whoever traces it."""
    return value.dim() == len(shape) and value.shape == tuple(shape)


def check_shaped(
    op: str, argument: str, value: Tensor, shape: tuple[int, ...], first: Tensor, first_name: str = "xs[0]"
) -> None:
    """``value`` is a tensor of that shape, of the first modality's dtype and device."""
    if not isinstance(value, Tensor) or value.dtype != first.dtype or value.device != first.device:
        checks.check_tensor(op, argument, value)
        check_kind(op, argument, value, first, first_name)
    if not has_shape(value, shape):
        raise checks.value_error(op, argument, f"shape {tuple(shape)}", tuple(value.shape))


def check_weight(op: str, argument: str, weight: Tensor, width: int, first: Tensor) -> int:
    """N of a weight (N, width)."""
    if not isinstance(weight, Tensor) or weight.dtype != first.dtype or weight.device != first.device:
        checks.check_tensor(op, argument, weight)
        check_kind(op, argument, weight, first)
    shape = weight.shape
    if len(shape) != 2 or shape[1] != width:
        raise checks.value_error(op, argument, f"shape {shape_text(('N', width))}", tuple(shape))
    return shape[0]


def check_presence(
    op: str, presence: Tensor, lead: torch.Size, count: int, first: Tensor, first_name: str = "xs[0]"
) -> None:
    """``presence`` is bool, one flag per modality, per row or for all rows."""
    checks.check_tensor(op, "presence", presence)
    if presence.dtype != torch.bool:
        raise checks.type_error(op, "presence", "dtype torch.bool", presence.dtype)
    checks.check_same_device(op, "presence", presence, first_name, first.device)
    if not has_shape(presence, (count,)) and not has_shape(presence, (*lead, count)):
        expected = f"shape {(*lead, count)} or {(count,)}" if lead else f"shape {(count,)}"
        raise checks.value_error(op, "presence", expected, tuple(presence.shape))


def row_presence(
    op: str, presence: Tensor, lead: torch.Size, count: int, first: Tensor, first_name: str = "xs[0]"
) -> Tensor:
    """As `check_presence`; one flag per modality, or per row over all leading dims and modality."""
    check_presence(op, presence, lead, count, first, first_name)
    return presence if presence.dim() == 1 else as_rows(presence)


def check_activation(op: str, activation: str | None) -> None:
    if activation is None or activation in ACTIVATIONS:
        return
    expected = f"None or one of {', '.join(ACTIVATIONS)}"
    if not isinstance(activation, str):
        raise checks.type_error(op, "activation", expected, type(activation).__name__)
    raise checks.value_error(op, "activation", expected, repr(activation))


def shape_text(shape: Sequence[int | str]) -> str:
    """As tuples print, with names for sizes that are free."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
