"""The arguments of an op, stated once: a ``NamedTuple`` whose annotations are the schema of its operators.

Its defaults and checks are the public function's. What an op is made of (fakes, kernels' Python sides, what is kept)
takes one such tuple; the reference takes its fields, as it is the specification.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

SymInt = Annotated[int, "SymInt"]  # a size, which is a symbol while shapes are dynamic
SymInts = Annotated[Sequence[int], "SymInt[]"]

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    Sequence[int]: "int[]",
    bool: "bool",
    Sequence[bool]: "bool[]",
    str: "str",
    str | None: "str?",
    torch.dtype | None: "ScalarType?",
}


def schema_of(arguments: Any) -> str:
    """The schema of a tuple's fields, as torch's operators have it."""
    return ", ".join(
        f"{hint.__metadata__[0] if typing.get_origin(hint) is Annotated else _TYPES[hint]} {name}"
        for name, hint in typing.get_type_hints(arguments, include_extras=True).items()
    )
