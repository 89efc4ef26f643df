"""Attentions and blocks of transformers that do not ask the attention interface."""

from __future__ import annotations

from mmkernels.integrations._swaps import Swap
from mmkernels.integrations.transformers import blip, grounding_dino, query_key_value

_MODELS = "transformers.models."

SWAPS: dict[str, Swap] = {
    _MODELS + name: swap
    for table in (query_key_value.SWAPS, grounding_dino.SWAPS, blip.SWAPS)
    for name, swap in table.items()
}
