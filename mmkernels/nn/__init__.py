"""Modules over the ops, with the constructor conventions of ``torch.nn``."""

from mmkernels.nn.concat_fusion import ConcatFusion
from mmkernels.nn.gated_fusion import GatedFusion
from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention

__all__ = ["ConcatFusion", "GatedFusion", "MultiheadCrossAttention"]
