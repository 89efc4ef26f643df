"""Modules over the ops, with the constructor conventions of ``torch.nn``."""

from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention

__all__ = ["MultiheadCrossAttention"]
