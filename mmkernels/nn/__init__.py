"""Modules over the ops, with the constructor conventions of ``torch.nn``."""

from mmkernels.nn.attention_pool import AdditiveAttentionPool, MultiplicativeAttentionPool, SplitAttentionPool
from mmkernels.nn.bidirectional_cross_attention import BidirectionalCrossAttention
from mmkernels.nn.concat_fusion import ConcatFusion
from mmkernels.nn.contrastive_loss import ContrastiveLoss, SigmoidContrastiveLoss
from mmkernels.nn.decision_fusion import DecisionFusion
from mmkernels.nn.deformable_attention import DeformableAttention
from mmkernels.nn.distillation_loss import DistillationLoss
from mmkernels.nn.gated_cross_attention_block import GatedCrossAttentionBlock
from mmkernels.nn.gated_fusion import GatedFusion
from mmkernels.nn.joint_attention import JointAttention
from mmkernels.nn.multihead_cross_attention import MultiheadCrossAttention
from mmkernels.nn.multimodal_cross_entropy import MultimodalCrossEntropy
from mmkernels.nn.tensor_fusion import LowRankFusion, TensorFusion
from mmkernels.nn.token_fusion_embedding import TokenFusionEmbedding

__all__ = [
    "AdditiveAttentionPool",
    "BidirectionalCrossAttention",
    "ConcatFusion",
    "ContrastiveLoss",
    "DecisionFusion",
    "DeformableAttention",
    "DistillationLoss",
    "GatedCrossAttentionBlock",
    "GatedFusion",
    "JointAttention",
    "LowRankFusion",
    "MultiheadCrossAttention",
    "MultimodalCrossEntropy",
    "MultiplicativeAttentionPool",
    "SigmoidContrastiveLoss",
    "SplitAttentionPool",
    "TensorFusion",
    "TokenFusionEmbedding",
]
