"""What the patterns of `graph_pass` read off the nodes of a graph: operations by one name each, arguments, tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

SERVED = (torch.float32, torch.bfloat16, torch.float16)

_FUNCTIONS: dict[Any, str] = {
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.multiply: "mul",
    operator.truediv: "div",
    torch.div: "div",
    operator.add: "add",
    torch.add: "add",
    torch.softmax: "softmax",
    F.softmax: "softmax",
    torch.masked_fill: "masked_fill",
    torch.masked_scatter: "masked_scatter",
    torch.cat: "cat",
    torch.concat: "cat",
    F.linear: "linear",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
    F.dropout: "dropout",
    torch.dropout: "dropout",
    F.gelu: "gelu",
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.unsqueeze: "unsqueeze",
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
}
_METHODS = {
    "matmul": "matmul",
    "bmm": "matmul",
    "mul": "mul",
    "div": "div",
    "add": "add",
    "softmax": "softmax",
    "masked_fill": "masked_fill",
    "masked_scatter": "masked_scatter",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "to": "to",
    "type_as": "to",
    "float": "to",
    "expand": "expand",
    "expand_as": "expand",
    "unsqueeze": "unsqueeze",
}
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


@dataclass
class Match:
    """A part of a graph that one call replaces.

    Attributes:
        what: the operations, in words.
        with_: the op that replaces them.
        call: inserts the call into a graph and returns the node that has the root's value.
        root: whose value the call has.
        inner: the other nodes that the call takes the place of.
        reason: why the part is left; None where it is not.
        slower: why the call would be no faster on the core at hand; None where it is.
    """

    what: str
    with_: str
    root: fx.Node
    call: Callable[[fx.Graph], fx.Node] | None = None
    inner: list[fx.Node] = field(default_factory=list)
    reason: str | None = None
    slower: str | None = None

    def left(self, reason: str) -> Match:
        self.reason = self.reason or reason
        return self


def op_of(node: Any) -> str | None:
    """What a node does, by one name for functions, operators and methods."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def value(node: Any) -> Tensor | None:
    """The fake tensor that a node makes."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether sizes are known to agree, without a guard on them."""
    return len(a) == len(b) and all(x is y or statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def size(n: Any) -> int:
    """A size, or what it was when the graph was traced, for choosing between ways alone."""
    if isinstance(n, int):
        return n
    hint = getattr(n.node, "hint", None)
    return 0 if hint is None else int(hint)


def rows_of(x: Tensor) -> int:
    return math.prod(size(n) for n in x.shape[:-1])


def number(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def is_scaled(node: fx.Node) -> bool:
    """Whether an add or a mul has more to it than its two arguments: alpha, rounding mode, out."""
    return len(node.args) != 2 or bool(node.kwargs)


def trains(node: fx.Node) -> bool:
    """Whether a gradient is taken of what the node makes."""
    out = value(node)
    return out is not None and out.requires_grad


def too_small(work: int, fewest: int) -> str | None:
    """Below, calling a kernel costs more than it gains."""
    return "slower here: too small" if work < fewest else None


def reason_of_tensors(nodes: Sequence[Any], masks: Sequence[Any] = ()) -> str | None:
    """Why tensors cannot go into one call; None where they can. ``nodes`` have one floating dtype, masks any."""
    tensors = [value(node) for node in nodes]
    others = [value(node) for node in masks]
    if any(t is None for t in (*tensors, *others)):
        return "the sizes of an argument are not known"
    kinds = {(t.device.type, t.dtype) for t in tensors if t is not None}
    if any(t.device.type != "cpu" for t in (*tensors, *others) if t is not None):
        return "not on the CPU"
    if len(kinds) != 1:
        return f"several dtypes: {', '.join(sorted(str(dtype) for _, dtype in kinds))}"
    if next(iter(kinds))[1] not in SERVED:
        return f"no kernel of {next(iter(kinds))[1]}"
    return None


def reason_of_span(graph: fx.Graph, match: Match) -> str | None:
    """Why the nodes of a match cannot become one at the place of the last of them."""
    inside = {match.root, *match.inner}
    for node in match.inner:
        if any(user not in inside for user in node.users):
            return f"{node.name} is used elsewhere"
    started = False
    for node in graph.nodes:
        started = started or node in inside
        if node is match.root:
            return None
        if started and node not in inside and (why := _reason_not_to_pass(node)):
            return why
    return None


def _reason_not_to_pass(node: fx.Node) -> str | None:
    """Why an operation cannot be moved behind another."""
    name = str(getattr(node.target, "__name__", node.target))
    if name in _MODES:
        return f"the mode changes in between: {name}"
    in_place = name.endswith("_") and not name.endswith("__")
    operators = node.op == "call_function" and name in ("setitem", "iadd", "imul", "isub", "itruediv", "iand", "ior")
    if in_place or operators or node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return f"something is changed in place in between: {node.name}"
    if node.op == "call_function" and node.target in (F.relu, F.silu) and argument(node, 1, "inplace"):
        return f"something is changed in place in between: {node.name}"
    return None
