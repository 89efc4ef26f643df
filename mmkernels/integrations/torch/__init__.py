"""torch itself: its attention for the whole process, a pass for its compiler, modules of ``torch.nn`` for
`accelerate`.
"""

from __future__ import annotations

from mmkernels.integrations.torch.activate import Activation, activate, deactivate
from mmkernels.integrations.torch.graph_pass import GraphPass, graph_pass
from mmkernels.integrations.torch.modules import SWAPS

__all__ = ["SWAPS", "Activation", "GraphPass", "activate", "deactivate", "graph_pass"]
