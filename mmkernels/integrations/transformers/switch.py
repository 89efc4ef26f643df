"""Sets models with transformers' attention interface to this library's attention, and back."""

from __future__ import annotations

import copy
import functools
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

_BEFORE = "_mmkernels_configs"
_LOOKS_AT_THE_NAME = re.compile(r"""_attn_implementation\s*(==\s*["']sdpa|in\s*\()""")


class Configs(dict[str, Any]):
    """What a module's configs were before, by attribute. Unpickling them registers the attention of those it has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (dict(self),)


def _unpickled(before: dict[str, Any]) -> Configs:
    register()
    return Configs(before)


def plan(model: nn.Module, chosen: Selection, known: set[str]) -> tuple[list[Entry], list[Callable[[], object]]]:
    """What there is to report, and the changes to make."""
    from transformers import PreTrainedModel

    entries: list[Entry] = []
    ours: list[Any] = []  # models that are to have our attention
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
                ours.append(module)
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if path in known or id(config) not in configs or not _uses_interface(type(module)):
            continue
        reason = configs[id(config)]
        status = "left" if reason else "replaced"
        entries.append(Entry(path, type(module).__name__, "cross_attention", status, reason))  # type: ignore[arg-type]
    return entries, [lambda: _switch(model, ours)] if ours else []


def _switch(root: nn.Module, models: list[Any]) -> None:
    """Give ``models`` of root our attention, in configs of their own: others may have been built from the same."""
    from transformers import PreTrainedConfig

    register()
    copies: dict[int, Any] = {}
    for module in root.modules():
        before = {k: v for k, v in module.__dict__.items() if isinstance(v, PreTrainedConfig)}
        if before:
            module.__dict__[_BEFORE] = Configs({**before, **module.__dict__.get(_BEFORE, {})})
            module.__dict__.update({k: copy.deepcopy(v, copies) for k, v in before.items()})
    for module in models:
        module.config._attn_implementation_internal = NAME


def undo(model: nn.Module) -> list[Callable[[], None]]:
    """Give the models under ``model`` the configs that they had; returns what sets theirs of now again."""
    again: list[Callable[[], None]] = []
    for module in model.modules():
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None:
            now = {name: module.__dict__[name] for name in before if name in module.__dict__}
            for name, config in now.items():
                _say_again(before[name], config)
            module.__dict__.update({name: before[name] for name in now})
            again.append(functools.partial(module.__dict__.update, {**now, _BEFORE: before}))
    return again


def _say_again(before: Any, now: Any) -> None:
    """What was set in a config since, but for the attention."""
    for name, value in now.__dict__.items():
        if name != "_attn_implementation_internal" and not hasattr(value, "_attn_implementation_internal"):
            before.__dict__[name] = value


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
    if _is_causal_by_mask_alone(module):
        return "its causal order depends on the kind of its attention"
    source = inspect.getsource(sys.modules[type(module).__module__])
    if _LOOKS_AT_THE_NAME.search(source):
        return "its code treats the attention's name specially"
    return None


def _is_causal_by_mask_alone(module: Any) -> bool:
    """Whether masks are causal and attentions say that they are not: "sdpa" forgets a mask where nothing is padded."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "create_causal_mask" not in code.co_names or "create_bidirectional_mask" in code.co_names:
        return False
    kinds = {type(attention) for _, attention in _attentions(module)}
    says_otherwise = all("self.is_causal = False" in inspect.getsource(kind.__init__) for kind in kinds)  # type: ignore[misc]
    return says_otherwise and "is_causal" not in inspect.getsource(type(module))
