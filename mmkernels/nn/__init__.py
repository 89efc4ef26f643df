"""Modules over the ops, with the constructor conventions of ``torch.nn``."""

from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention
from mmkernels.nn.tensor_fusion import LowRankFusion, TensorFusion

__all__ = ["LowRankFusion", "MultiheadCrossAttention", "TensorFusion"]
