"""Argument checks that ops share. Every message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from typing import Any, cast

import torch
from torch import Tensor

FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def type_error(op: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument}: expected {expected}; got {got}")


def value_error(op: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument}: expected {expected}; got {got}")


def check_tensor(op: str, argument: str, value: object) -> None:
    """``value`` is a tensor with strides: no sparse, nested or MKL-DNN one."""
    if not isinstance(value, Tensor):
        raise type_error(op, argument, "a torch.Tensor", type(value).__name__)
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise type_error(op, argument, "a dense tensor, of layout torch.strided", f"a {kind} tensor")


def check_layouts(op: str, arguments: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """All tensors among the values, those in lists too, have strides."""
    for argument, value in zip(arguments, values, strict=True):
        if isinstance(value, Tensor):
            check_tensor(op, argument, value)
        elif isinstance(value, (list, tuple)):
            for i, element in enumerate(value):
                if isinstance(element, Tensor):
                    check_tensor(op, f"{argument}[{i}]", element)


def check_same_device(op: str, argument: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        raise RuntimeError(f"{op}: {argument}: expected the device of {other}, {device}; got {value.device}")


def check_same_kind(op: str, first: Tensor, first_name: str, **others: Tensor) -> None:
    """All others have the dtype and the device of the first."""
    for name, tensor in others.items():
        if tensor.dtype != first.dtype:
            raise type_error(op, name, f"the dtype of {first_name}, {first.dtype}", tensor.dtype)
        check_same_device(op, name, tensor, first_name, first.device)


def check_number(op: str, argument: str, value: Any) -> float:
    """The value as torch takes numbers: of Python, of NumPy, or a tensor without dims."""
    if type(value) is float or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return cast(float, value)
    if isinstance(value, Tensor):
        check_tensor(op, argument, value)
        if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
            got = f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
            raise type_error(op, argument, "a number, or a real tensor without dims", got)
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise type_error(op, argument, "a number", type(value).__name__)
    try:
        return float(value)
    except OverflowError:
        raise value_error(op, argument, "a number in the range of float64", value) from None


def check_index(op: str, argument: str, value: Any, expected: str = "an int") -> int:
    """The value as an int, where it is one of Python, of NumPy, or symbolic."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return cast(int, value)
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise type_error(op, argument, expected, type(value).__name__) from None


def check_count(op: str, argument: str, what: str, *sizes: int) -> None:
    """The product of the sizes can be counted in 64 bits; expanded tensors have any sizes for nothing."""
    if torch.compiler.is_compiling():
        return
    count = math.prod(sizes)
    if type(count) is int and count >= 2**63:  # no guard on symbolic sizes
        raise value_error(op, argument, f"fewer than 2**63 {what}", " · ".join(map(str, sizes)))


def eager_values_readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at: real CPU tensors, outside of any tracing, transform or mode."""
    if torch.compiler.is_compiling():
        return False
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or any(type(t) is not Tensor or t.device.type != "cpu" for t in tensors)
    )


def autocast_is_on(device: torch.device) -> bool:
    if not torch._C._is_any_autocast_enabled():  # the cheap question, and nearly always the last
        return False
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast_inputs(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where they are eligible, as torch's own fused ops cast them."""
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocast_promoted(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes, as autocast does for ops that are exact in either, such as cat."""
    dtypes = [t.dtype for t in tensors if t is not None and t.is_floating_point()]
    widest = functools.reduce(torch.promote_types, dtypes) if dtypes else None
    # An absent tensor stays None; the annotation spares callers the same union for each of theirs.
    return tuple(t.to(widest) if t is not None and t.is_floating_point() else t for t in tensors)  # type: ignore[misc]
