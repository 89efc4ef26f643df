"""torch itself: its attention for the whole process, and modules of ``torch.nn`` in `accelerate`."""

from __future__ import annotations

from mmkernels.integrations.torch.activate import Activation, activate, deactivate
from mmkernels.integrations.torch.modules import SWAPS

__all__ = ["SWAPS", "Activation", "activate", "deactivate"]
