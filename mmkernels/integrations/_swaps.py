"""What is known to replace what: classes by their full name, versions of them by a hash of the forward's source."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


class SwappedForward(functools.partial[Any]):
    """``forward`` of one instance: it pickles, and a deep copy of the module has one of its own.

    Its signature is the class's forward's, which ``generate`` of transformers looks at.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        module = self.args[0]
        return inspect.signature(type(module).forward.__get__(module))


class SwappedCall(functools.partial[Any]):
    """The ``__call__`` of a swapped processor, with the original's signature."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.args[0].__call__)


class SwappedProcessor:
    """The processor of one attention of diffusers, in place of ``original``."""

    def __init__(self, function: Callable[..., Any], original: Any) -> None:
        self.function = function
        self.original = original
        self.__dict__["__call__"] = SwappedCall(function, original)  # attentions ask it which arguments to pass on

    def __call__(self, attn: nn.Module, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.original, attn, hidden_states, *args, **kwargs)


@dataclass(frozen=True)
class Swap:
    """A replacement of the forward of a class, or of the ``__call__`` of a processor.

    Attributes:
        function: ``function(module, *args, **kwargs)``, of a module's top level, so that it pickles. It falls back to
            the class's own forward where it cannot serve a call.
        with_: the ops that it calls.
        sources: the hashes of what it is a replacement of.
        why_not: says of a module why it cannot be replaced, or None.
        concerns: whether it is about a module at all; by default all of the class.
    """

    function: Callable[..., Any]
    with_: str
    sources: tuple[str, ...]
    why_not: Callable[[nn.Module], str | None] | None = None
    concerns: Callable[[nn.Module], bool] | None = None


@functools.cache
def source_hash(function: Callable[..., Any]) -> str:
    """Of the source of a forward: what two releases with one hash have in common is that code."""
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return "no source"
    lines = (line.rstrip() for line in textwrap.dedent(source).splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def calls_otherwise(**known: str) -> Callable[[nn.Module], str | None]:
    """A `Swap.why_not` of a class whose forward calls other methods: their names and the hashes of their sources."""

    def why_not(module: nn.Module) -> str | None:
        for name, expected in known.items():
            if (found := source_hash(getattr(type(module), name))) != expected:
                return f"an unknown version of its {name}: hash {found}"
        return None

    return why_not


# Which file has the swaps of the classes of a library, by the first word of their modules' names.
_TABLES = {
    "diffusers": "mmkernels.integrations.diffusers",
    "open_clip": "mmkernels.integrations.open_clip",
    "timm": "mmkernels.integrations.timm",
    "torch": "mmkernels.integrations.torch",
    "transformers": "mmkernels.integrations.transformers.swaps",
}


def find_swap(kind: type) -> Swap | None:
    """The swap of a class. The file of its library is imported when the first of its classes is met."""
    library = kind.__module__.partition(".")[0]
    if library not in _TABLES:
        return None
    table = importlib.import_module(_TABLES[library])
    swaps: Mapping[str, Swap] = table.SWAPS
    swap = swaps.get(f"{kind.__module__}.{kind.__qualname__}")
    return table.find_by_source(kind) if swap is None and hasattr(table, "find_by_source") else swap


@dataclass(frozen=True)
class Place:
    """What of a module can be swapped: its forward or its processor."""

    module: nn.Module
    attribute: str
    swap: Swap

    @property
    def what(self) -> str:
        return type(self.module if self.attribute == "forward" else self.original).__name__

    @property
    def original(self) -> Any:
        """The processor, or the class's forward."""
        if self.attribute == "forward":
            return type(self.module).forward
        found = self.module.__dict__["processor"]
        return found.original if isinstance(found, SwappedProcessor) else found

    def is_swapped(self) -> bool:
        return isinstance(self.module.__dict__.get(self.attribute), (SwappedForward, SwappedProcessor))

    def reason_to_leave(self) -> str | None:
        """Why the module cannot be swapped, though its class is known."""
        if self.attribute == "forward" and "forward" in self.module.__dict__:
            return "its forward has been replaced by another"
        original = self.original if self.attribute == "forward" else type(self.original).__call__
        if (found := source_hash(original)) not in self.swap.sources:
            return f"an unknown version of it: hash {found}, known {', '.join(self.swap.sources)}"
        return self.swap.why_not(self.module) if self.swap.why_not is not None else None

    def apply(self) -> None:
        if self.attribute == "forward":
            self.module.__dict__["forward"] = SwappedForward(self.swap.function, self.module)
        else:
            self.module.__dict__["processor"] = SwappedProcessor(self.swap.function, self.original)

    def undo(self) -> None:
        if self.attribute == "forward":
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["processor"] = self.original


def place_in(module: nn.Module) -> Place | None:
    """What of the module can be swapped, or is."""
    swap = find_swap(type(module))
    if swap is not None and (swap.concerns is None or swap.concerns(module)):
        return Place(module, "forward", swap)
    processor = module.__dict__.get("processor")
    if isinstance(processor, SwappedProcessor):
        processor = processor.original
    if processor is not None and (swap := find_swap(type(processor))) is not None:
        return Place(module, "processor", swap)
    return None
