"""Modules over the ops, with the constructor conventions of ``torch.nn``."""

from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention
from mmkernels.nn.token_fusion_embedding import TokenFusionEmbedding

__all__ = ["MultiheadCrossAttention", "TokenFusionEmbedding"]
