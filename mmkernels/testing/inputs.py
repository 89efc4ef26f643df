"""Arguments for any op: its example, and random calls.

They are made from what each op states as its examples (``mmkernels/ops/_examples.py``). Which of its tensors may be
left out, and what its options may be, its signature says.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import random
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mmkernels.ops
from mmkernels.ops._examples import Draw

Inputs = dict[str, Any]
Layout = Callable[[Tensor], Tensor]


def _find_calls() -> dict[str, Callable[..., Inputs]]:
    """For every op and choice of its options ``(draw, **sizes)`` -> the arguments."""
    calls: dict[str, Callable[..., Inputs]] = {}
    for module in pkgutil.iter_modules(mmkernels.ops.__path__):
        if module.ispkg:
            examples = importlib.import_module(f"mmkernels.ops.{module.name}.reference").example_inputs
            for option in examples(Draw()):
                calls[f"{module.name}, {option}"] = functools.partial(_example, examples, option)
    # What torch calls scaled_dot_product_attention is no op of its own.
    calls["scaled_dot_product_attention, plain"] = calls["cross_attention, plain"]
    return calls


def _example(examples: Callable[..., Any], option: str, draw: Draw, **sizes: int) -> Inputs:
    inputs: Inputs = examples(draw, **sizes)[option]
    return inputs


def _with_gaps(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def _transposed(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


# The same values, laid out otherwise in memory.
LAYOUTS: dict[str, Layout] = {
    "within wider rows": _with_gaps,
    "a column of a matrix": lambda x: torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": _transposed,
}

# Values of the options that are numbers, and of those whose type does not name them all.
_NUMBERS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0, 0.3, 1.0),
    "clamp": (None, 2.0),
    "dropout_p": (0.0, 0.0, 0.3),
    "eps": (0.01, 1.0),  # a row of one or two features has a variance near 0, and gradients that are divided by it
    "label_smoothing": (0.0, 0.1),
    "q": (0.3, 0.7),
    "scale": (None, 0.3, -0.1),
    "softcap": (0.0, 2.0),
    "temperature": (0.5, 1.0, 4.0),
    "window": (None, (3, 5), (-1, 0)),
}
_MOST_WORK = 20_000_000  # of a random call: the product of its sizes, the largest twice, as scores have it
_LEFT_ALONE = frozenset({"check", "group", "is_log_scale", "linear", "out_dtype", "rank", "return_gate"})


CALLS = _find_calls()


def op_names() -> list[str]:
    """The public ops that arguments can be made for."""
    return sorted({_op_of(name) for name in CALLS})


def _op_of(name: str) -> str:
    return name.partition(",")[0]


def function_of(op: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(mmkernels, op)
    return function


def example_inputs(
    op: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Inputs:
    """The arguments of one small and typical call of an op, by their names.

    Raises:
        ValueError: there is no such op.
    """
    _known(op)
    with torch.device(device):
        return next(call for name, call in CALLS.items() if _op_of(name) == op)(Draw(dtype, seed))


def random_inputs(
    op: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    most: int = 40,
    layouts: bool = False,
) -> Inputs:
    """The arguments of a random call of an op: sizes from 1 to about ``most``, any of its options, some of its optional
    tensors; with ``layouts`` half of the tensors are not contiguous. Floating tensors require grad, and the call is
    valid.

    Raises:
        ValueError: there is no such op.
    """
    from mmkernels._dispatch import explain

    _known(op)
    chosen = random.Random(f"{op} {seed}")
    function = function_of(op)
    ways = [call for name, call in CALLS.items() if _op_of(name) == op]
    while True:
        way = chosen.choice(ways)
        names = list(inspect.signature(way.args[0]).parameters)[1:]  # type: ignore[attr-defined]
        sizes = {size: _drawn_size(chosen, size, most) for size in names}
        if math.prod(sizes.values()) * max(sizes.values()) > _MOST_WORK:
            continue
        with torch.device(device):
            inputs = way(Draw(dtype, chosen.getrandbits(32)), **sizes)
        inputs = _with_options(chosen, function, inputs)
        try:
            explain(function, **inputs)
        except ValueError:  # options that exclude each other
            continue
        if layouts:
            inputs = pytree.tree_map_only(Tensor, lambda x: _rearranged(chosen, x), inputs)
        return pytree.tree_map(_leaf, inputs)


def _known(op: str) -> None:
    if op not in op_names():
        raise ValueError(f"expected one of {', '.join(op_names())}; got {op!r}")


def _drawn_size(draw: random.Random, name: str, most: int) -> int:
    """Small ones and multiples of eight more often than others."""
    least = 3 if name == "C" else 1  # the norm of one feature is a constant, and its gradient rounding alone
    return draw.choice(
        (draw.randint(least, 4), draw.randint(least, max(least, most)), 8 * draw.randint(1, max(1, most // 8)))
    )


def _with_options(draw: random.Random, function: Callable[..., Any], inputs: Inputs) -> Inputs:
    """The arguments without some of those that may be left out, and with some of the options of the signature."""
    hints = typing.get_type_hints(function)
    chosen = dict(inputs)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in _LEFT_ALONE or parameter.default is parameter.empty:
            continue
        given = inputs.get(name)
        if isinstance(given, (Tensor, list)):
            if draw.random() < 0.4:
                del chosen[name]
        elif values := _values(name, hints[name]):
            chosen[name] = draw.choice(values)
    return chosen


def _values(name: str, hint: Any) -> tuple[Any, ...]:
    """What an option may be, nothing where neither a table nor its type says so."""
    if name in _NUMBERS:
        return _NUMBERS[name]
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    values = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    if values and type(None) in kinds:
        values.append(None)
    return (False, True) if bool in kinds else tuple(values)


def _rearranged(draw: random.Random, x: Tensor) -> Tensor:
    return draw.choice(list(LAYOUTS.values()))(x) if x.dim() and x.numel() and draw.random() < 0.5 else x


def _leaf(x: Any) -> Any:
    return x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
