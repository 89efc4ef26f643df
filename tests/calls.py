"""Calls of every op that there is, as its ``reference.py`` states them, for the tests of what all ops promise."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels as mmk
import mmkernels.ops
from mmkernels._differentiable import DifferentiableOp
from mmkernels.ops._examples import Draw, Examples

Inputs = dict[str, Any]

OPS = [module.name for module in pkgutil.iter_modules(mmkernels.ops.__path__) if module.ispkg]


def flat(values: Any) -> Iterator[Tensor]:
    """All tensors among values, those in lists and tuples included."""
    if isinstance(values, Tensor):
        yield values
    for value in values if isinstance(values, (list, tuple)) else ():
        yield from flat(value)


def reference_of(op: str) -> Any:
    return importlib.import_module(f"mmkernels.ops.{op}.reference")


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x for x in flat(list(inputs.values())) if is_leaf(x)]


def in_one(result: Any) -> Tensor:
    """All outputs of a call in one vector; the LSE of a row without keys, −∞, is left out."""
    return torch.cat([t.flatten().masked_fill(t.flatten() == -torch.inf, 0) for t in flat(result)])


def is_leaf(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def mapped(values: Any, change: Callable[[Tensor], Any], which: Callable[[Any], bool] = is_leaf) -> Any:
    """The values with ``change`` applied to the tensors that ``which`` is true of, in order."""
    if isinstance(values, dict):
        return {name: mapped(value, change, which) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(mapped(value, change, which) for value in values)
    return change(values) if which(values) else values


@dataclass(frozen=True, eq=False)
class Call:
    """A public function with one choice of its options, on tensors of given sizes.

    Its leaves are the floating tensors among the arguments: it is called on these alone, and gives all outputs in one
    vector; ``raw`` gives them as the function does.
    """

    op: str
    option: str
    sizes: tuple[tuple[str, int], ...] = ()  # default: the op's own
    fixed: tuple[tuple[str, Any], ...] = ()  # arguments other than the example's
    name: str = ""  # of the public function; default: the op's
    _template: Inputs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_template", self.inputs())  # drawn before any transform or trace

    @property
    def public(self) -> Callable[..., Any]:
        return getattr(mmk, self.name or self.op)

    def __str__(self) -> str:
        return f"{self.name or self.op}, {self.option}"

    def at(self, **sizes: int) -> Call:
        """With other sizes, as far as it has them."""
        known = self.default_sizes()
        sizes = dict(self.sizes) | {name: size for name, size in sizes.items() if name in known}
        return replace(self, sizes=tuple(sizes.items()))

    def varied(self, option: str, **arguments: Any) -> Call:
        return replace(self, option=option, fixed=(("option", self.option), *arguments.items()))

    def default_sizes(self) -> dict[str, int]:
        parameters = list(inspect.signature(self._examples).parameters.values())[1:]
        return {p.name: p.default for p in parameters}

    def small(self) -> Call:
        """For what is taken apart element by element."""
        return self.at(**{name: min(size, 3) for name, size in self.default_sizes().items()})

    def large(self) -> Call:
        """Several tiles and tasks."""
        sizes = self.default_sizes()
        tokens = any(name[0] in "LT" for name in sizes)
        factors = {"B": 1 if tokens else 150, "H": 1, "M": 1, "R": 1} | {n: 20 for n in sizes if n[0] in "LT"}
        return self.at(**{name: size * factors.get(name, 9) for name, size in sizes.items()})

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
        fixed = dict(self.fixed)
        example = self._examples(Draw(dtype, seed), **dict(self.sizes))[fixed.pop("option", self.option)]
        return example | mapped(fixed, lambda x: x.to(dtype))

    def leaves(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        return leaves_of(self.inputs(dtype, seed))

    def raw(self, *leaves: Tensor) -> Any:
        left = iter(leaves)
        return self.public(**mapped(self._template, lambda _: next(left)))

    def __call__(self, *leaves: Tensor) -> Tensor:
        return in_one(self.raw(*leaves))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The call with other tensors, of any dtype, in the places of the example's."""
        left = iter(tensors)
        return self.public(**mapped(self._template, lambda _: next(left), is_tensor))

    @property
    def registered(self) -> DifferentiableOp:
        op: DifferentiableOp = getattr(importlib.import_module(f"mmkernels.ops.{self.op}.op"), f"{self.op}_op")
        return op

    def weights(self) -> list[str]:
        """The arguments that its products read as they lie."""
        return [name for name in self.registered.weights if name in self._template]

    def is_derivative(self) -> bool:
        """Whether its gradients are derivatives, and not scaled by design."""
        return self.option not in getattr(self._reference, "SCALED_GRADIENTS", ())

    @property
    def _reference(self) -> Any:
        return reference_of(self.op)

    @property
    def _examples(self) -> Callable[..., Examples]:
        return self._reference.example_inputs


def _every_call() -> Iterator[Call]:
    for op in OPS:
        yield from (Call(op, option) for option in reference_of(op).example_inputs(Draw()))
    yield Call("cross_attention", "plain", name="scaled_dot_product_attention")


CALLS = {str(call): call for call in _every_call()}
FIRST = {call.op: call for call in reversed(CALLS.values())}  # the first of each op
SMALL = {name: call.small() for name, call in CALLS.items()}
each_call = pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
each_small_call = pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in SMALL.items()])


def op_calls(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DifferentiableOp, tuple[Any, ...]]]:
    """The ops that a call comes to, and their arguments."""
    calls = []
    run = DifferentiableOp.__call__

    def watched(op: DifferentiableOp, *args: Any) -> tuple[Tensor, ...]:
        calls.append((op, args))
        return run(op, *args)

    with monkeypatch.context() as patched, mmk.use_backend("reference"):
        patched.setattr(DifferentiableOp, "__call__", watched)
        call(*(x.requires_grad_() for x in call.leaves()))
    return calls


def took_the_node(out: Tensor) -> bool:
    """Whether a node of ours in C++ is in the graph."""
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node.name().startswith("mmkernels::"):
            return True
        nodes += [] if node is None else [n for n, _ in node.next_functions]
    return False
