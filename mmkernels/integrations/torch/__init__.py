"""torch itself: its attention for the whole process, a pass for its compiler, modules of ``torch.nn`` for
`accelerate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmkernels.integrations.torch.activate import Activation, activate, deactivate
from mmkernels.integrations.torch.modules import SWAPS

if TYPE_CHECKING:
    from mmkernels.integrations.torch.graph_fusion import GraphPass, graph_pass

__all__ = ["SWAPS", "Activation", "GraphPass", "activate", "deactivate", "graph_pass"]


def __getattr__(name: str) -> Any:
    """What needs the compiler is imported when it is asked for: that takes more than a second."""
    if name in ("GraphPass", "graph_pass"):
        return getattr(importlib.import_module("mmkernels.integrations.torch.graph_fusion"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
