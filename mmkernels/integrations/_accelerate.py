"""Walks over a model, swaps what is known, says what was left."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import TracebackType

from torch import nn

from mmkernels.integrations._report import Entry, Report
from mmkernels.integrations._swaps import Place, place_in

__all__ = ["accelerate", "restore"]


def accelerate(
    model: nn.Module,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    strict: bool = False,
    mask_text_padding: bool = False,
) -> Report:
    """Make an existing model faster: swap what this library has kernels for.

    Swapped is the ``forward`` (or, in diffusers, the processor) of single instances whose exact class and version are
    known; models of transformers with an attention interface are set to ``attn_implementation="mmkernels"``, as their
    ``set_attn_implementation`` sets it. Classes, parameters, buffers and the state dict stay as they are. A swapped
    forward runs the original one where it cannot serve a call, as when attention weights are asked for. Applying it
    twice changes nothing.

    Args:
        model: any module; what is known inside of it is found.
        only: patterns (``fnmatch``) of the paths or classes that may be swapped; None = all.
        skip: patterns of the paths or classes that may not.
        strict: raise where anything else is left.
        mask_text_padding: let nobody attend to the padding of a prompt in diffusers' joint attention (SD3), whose own
            looks at no mask: the model is then called with ``joint_attention_kwargs={"attention_mask": mask}``, the
            tokenizer's (B, L) of ones and zeros. What it computes changes.

    Returns:
        A `Report`, one entry for each module that was swapped or left, with reasons. It is a context manager that
        restores the model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``mask_text_padding`` of a model without such an attention; the model is as it was before.
        RuntimeError: ``strict``, and something is left; the model is as it was before.

    Example:
        >>> model = nn.TransformerDecoder(nn.TransformerDecoderLayer(512, 8, batch_first=True), 2)
        >>> report = accelerate(model)
        >>> sum(entry.what == "MultiheadAttention" for entry in report.replaced)
        4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model: expected a torch.nn.Module; got {type(model).__name__}")
    chosen = Selection(only, skip)
    entries: list[Entry] = []
    changes: list[Callable[[], object]] = []
    for path, module in model.named_modules():
        if (place := place_in(module)) is not None:
            reason = None if place.is_swapped() else chosen.reason_to_leave(path, module) or place.reason_to_leave()
            entries.append(Entry(path, place.what, place.swap.with_, "left" if reason else "replaced", reason))
            if not (reason or place.is_swapped()):
                changes.append(place.apply)
    if "transformers" in sys.modules:
        from mmkernels.integrations.transformers import switch

        more_entries, more_changes = switch.plan(
            model, chosen, {entry.path for entry in entries if entry.with_ != "norm_rotary"}
        )
        entries += more_entries
        changes += more_changes
    entries += _unknown_attentions(model, entries)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    entries.sort(key=lambda entry: order[entry.path])
    report = Report(entries, functools.partial(restore, model))
    if strict and (left := [entry for entry in report.left if not chosen.is_reason(entry.reason)]):
        raise RuntimeError("accelerate: strict: expected nothing to be left; got\n" + "\n".join(map(str, left)))
    if mask_text_padding and not any(e.what == _JOINT_ATTENTION for e in report.replaced):
        raise ValueError(
            f"accelerate: mask_text_padding: expected a model with a {_JOINT_ATTENTION}; got none to replace"
        )
    for change in changes:
        change()
    if mask_text_padding:
        from mmkernels.integrations.diffusers import mask_text_padding_of

        mask_text_padding_of(model)
    return report


_JOINT_ATTENTION = "JointAttnProcessor2_0"


class restore(contextlib.AbstractContextManager["restore"]):
    """Give a model back what `accelerate` swapped.

    As a context manager, ``with restore(model): ...``, the model is plain inside of the block; afterwards what had been
    swapped is swapped again.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"restore: model: expected a torch.nn.Module; got {type(model).__name__}")
        self._again: list[Callable[[], object]] = []
        for module in model.modules():
            place: Place | None = place_in(module)
            if place is not None and place.is_swapped():
                place.undo()
                self._again.append(place.apply)
        if "transformers" in sys.modules:
            from mmkernels.integrations.transformers import switch

            self._again += switch.undo(model)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for change in self._again:
            change()


class Selection:
    """What ``only`` and ``skip`` let through."""

    def __init__(self, only: str | Sequence[str] | None, skip: str | Sequence[str] | None) -> None:
        self._only = (only,) if isinstance(only, str) else None if only is None else tuple(only)
        self._skip = (skip,) if isinstance(skip, str) else tuple(skip or ())

    def reason_to_leave(self, path: str, module: nn.Module) -> str | None:
        names = (path, type(module).__name__)
        if self._only is not None and not any(fnmatchcase(n, pattern) for n in names for pattern in self._only):
            return f"not in only={self._only}"
        if any(fnmatchcase(n, pattern) for n in names for pattern in self._skip):
            return f"in skip={self._skip}"
        return None

    def is_reason(self, reason: str | None) -> bool:
        return reason in (f"not in only={self._only}", f"in skip={self._skip}")


def _unknown_attentions(model: nn.Module, entries: list[Entry]) -> Iterator[Entry]:
    """Attentions that nothing is known for, nor for what they are inside of or what is inside of them."""
    known = {entry.path for entry in entries}
    inside_of_known = tuple(f"{e.path}." for e in entries if e.path and e.with_ != "concat_linear")
    around_known = {path[:i] for path in known for i, c in enumerate(path) if c == "."}
    for path, module in model.named_modules():
        if not type(module).__name__.endswith(("Attention", "Attn", "AttentionPool", "AttentionBlock")):
            continue
        if path in known or path in around_known or path.startswith(inside_of_known):
            continue
        yield Entry(path, type(module).__name__, "", "left", "no replacement of this class is known")
