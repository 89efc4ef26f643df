"""Sets models with transformers' attention interface to this library's attention, and back."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from mmkernels.integrations._report import Entry
from mmkernels.integrations.transformers import NAME, register

if TYPE_CHECKING:
    from mmkernels.integrations._accelerate import Selection

_BEFORE = "_mmkernels_attn_implementation"
_LOOKS_AT_THE_NAME = re.compile(r"""_attn_implementation\s*(==\s*["']sdpa|in\s*\()""")


class Switched(str):
    """The attention that a model had. Unpickling one registers ours, which the model then has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _switched, (str(self),)


def _switched(before: str) -> Switched:
    register()
    return Switched(before)


def plan(model: nn.Module, chosen: Selection, known: set[str]) -> tuple[list[Entry], list[Callable[[], object]]]:
    """What there is to report, and the changes to make."""
    from transformers import PreTrainedModel

    entries: list[Entry] = []
    changes: list[Callable[[], object]] = []
    configs: dict[int, str | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in configs:
            attentions = _attentions(module)
            if not attentions:
                continue
            prefix = f"{path}." if path else ""
            reasons = [chosen.reason_to_leave(prefix + p, m) for p, m in attentions if prefix + p not in known]
            reason = _reason_to_leave(module) or next(filter(None, reasons), None)
            configs[id(module.config)] = reason
            if reason is None and module.config._attn_implementation != NAME:
                changes.append(_change(module))
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if path in known or id(config) not in configs or not _uses_interface(type(module)):
            continue
        reason = configs[id(config)]
        status = "left" if reason else "replaced"
        entries.append(Entry(path, type(module).__name__, "cross_attention", status, reason))  # type: ignore[arg-type]
    return entries, changes


def _change(module: nn.Module) -> Callable[[], None]:
    def change() -> None:
        register()
        config: Any = module.config
        module.__dict__[_BEFORE] = Switched(config._attn_implementation)
        config._attn_implementation_internal = NAME

    return change


def undo(model: nn.Module) -> list[Callable[[], None]]:
    """Give the models under ``model`` the attention that they had; returns what sets ours again."""
    again = []
    for module in model.modules():
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None:
            module.config._attn_implementation_internal = str(before)  # type: ignore[union-attr]
            again.append(_change(module))
    return again


def _uses_interface(kind: type) -> bool:
    code = getattr(inspect.unwrap(getattr(kind, "forward", _uses_interface)), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _attentions(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that ask the interface, by this model's config."""
    config = module.config
    return [
        (path, m)
        for path, m in module.named_modules()
        if getattr(m, "config", None) is config and _uses_interface(type(m))
    ]


def _reason_to_leave(module: Any) -> str | None:
    before = module.config._attn_implementation
    if before == NAME:
        return None
    if before not in ("sdpa", "eager"):
        return f'its attention is "{before}"'
    if before == "eager" and module._supports_sdpa:
        return 'its attention was chosen to be "eager"'  # whose bool masks, if a caller makes them, are numbers to add
    if not module._can_set_attn_implementation():
        return "its class does not let its attention be set"
    if not (module._supports_sdpa or module._supports_flex_attn or module._supports_flash_attn):
        return "its class takes the additive masks of eager attention alone"
    source = inspect.getsource(sys.modules[type(module).__module__])
    if _LOOKS_AT_THE_NAME.search(source):
        return "its code treats the attention's name specially"
    return None
