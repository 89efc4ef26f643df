"""torch itself: modules of ``torch.nn`` in `accelerate`."""

from __future__ import annotations

from mmkernels.integrations.torch.modules import SWAPS

__all__ = ["SWAPS"]
