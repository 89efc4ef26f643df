"""Whether a child's parameters say all that it does, so that an op may take them in place of a call of the child."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as globals_of_modules

_GLOBAL_HOOKS = (
    globals_of_modules._global_forward_hooks,
    globals_of_modules._global_forward_pre_hooks,
    globals_of_modules._global_backward_hooks,
    globals_of_modules._global_backward_pre_hooks,
)


def is_plain(child: nn.Module, kind: type[nn.Module]) -> bool:
    """Exactly torch's own class, which parametrisations, wrappers and quantised layers are not, without hooks, a
    forward of its own or parameters that are themselves a subclass with parts (quantised or distributed ones)."""
    return (
        type(child) is kind
        and not (child._forward_hooks or child._forward_pre_hooks or child._backward_hooks)
        and not (child._backward_pre_hooks or any(_GLOBAL_HOOKS) or "forward" in child.__dict__)
        and all(type(p) is nn.Parameter or not _has_parts(p) for p in child._parameters.values())
    )


def _has_parts(parameter: torch.Tensor | None) -> bool:
    return hasattr(parameter, "__tensor_flatten__")
