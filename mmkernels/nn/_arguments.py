"""What the modules ask of their constructors' arguments, in the words of the ops' own errors."""

from __future__ import annotations

from collections.abc import Sequence

from mmkernels.ops._checks import type_error, value_error


def check_sizes(module: str, least: int = 0, **sizes: object) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise type_error(module, name, "an int", type(size).__name__)
        if size < least:
            raise value_error(module, name, f"a size ≥ {least}", size)


def checked_widths(module: str, argument: str, widths: Sequence[int], of: str = "modality") -> tuple[int, ...]:
    """The width of each modality, or of each of what else the module takes, as a tuple."""
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise type_error(module, argument, f"a list of ints, one per {of}", type(widths).__name__)
    if not widths:
        raise value_error(module, argument, f"at least one {of}", "none")
    check_sizes(module, **{f"{argument}[{i}]": width for i, width in enumerate(widths)})
    return tuple(widths)
