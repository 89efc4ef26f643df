"""Models of Hugging Face's transformers.

`register` offers ``attn_implementation="mmkernels"``, an attention for every model with transformers' attention
interface; `mmkernels.integrations.accelerate` chooses it for those, and swaps attentions that are written by hand.
"""

from __future__ import annotations

__all__ = ["NAME", "register"]

NAME = "mmkernels"


def register() -> None:
    """Offer ``attn_implementation="mmkernels"`` to all models: the attention function and the masks that go with it.

    Example:
        >>> register()
        >>> model = CLIPModel.from_pretrained(name, attn_implementation="mmkernels")
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from mmkernels.integrations.transformers.interface import attention, attention_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
