"""Kernels for multimodal models: drop-in ops for PyTorch, each with a readable reference.

Every op raises:
    ValueError: shapes or values that do not fit.
    TypeError: a wrong type or dtype.
    RuntimeError: tensors on different devices.
    mmkernels.UnsupportedError: a forced backend cannot serve the call.
"""

from __future__ import annotations

from mmkernels import nn
from mmkernels._dispatch import Explanation, explain, use_backend
from mmkernels._errors import UnsupportedError
from mmkernels._fork import watch_forks
from mmkernels.ops.additive_attention_pool import additive_attention_pool
from mmkernels.ops.bidirectional_cross_attention import bidirectional_cross_attention
from mmkernels.ops.bilinear_fusion import bilinear_fusion
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.concat_norm_linear import concat_norm_linear
from mmkernels.ops.concat_tokens import concat_tokens
from mmkernels.ops.contrastive_loss import contrastive_loss
from mmkernels.ops.cross_attention import cross_attention, scaled_dot_product_attention
from mmkernels.ops.decision_fusion import decision_fusion
from mmkernels.ops.deformable_attention import deformable_attention
from mmkernels.ops.distillation_loss import distillation_loss
from mmkernels.ops.gated_concat import gated_concat
from mmkernels.ops.gated_fusion import gated_fusion
from mmkernels.ops.joint_attention import joint_attention
from mmkernels.ops.low_rank_fusion import low_rank_fusion
from mmkernels.ops.merge_attention import merge_attention
from mmkernels.ops.merge_embeddings import merge_embeddings
from mmkernels.ops.modulated_norm import modulated_norm
from mmkernels.ops.multimodal_cross_entropy import multimodal_cross_entropy
from mmkernels.ops.multiplicative_attention_pool import multiplicative_attention_pool
from mmkernels.ops.norm_rotary import norm_rotary
from mmkernels.ops.sigmoid_contrastive_loss import sigmoid_contrastive_loss
from mmkernels.ops.split_attention_pool import split_attention_pool
from mmkernels.ops.tensor_fusion_linear import tensor_fusion_linear
from mmkernels.ops.varlen_cross_attention import varlen_cross_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "UnsupportedError",
    "additive_attention_pool",
    "bidirectional_cross_attention",
    "bilinear_fusion",
    "concat_linear",
    "concat_norm_linear",
    "concat_tokens",
    "contrastive_loss",
    "cross_attention",
    "decision_fusion",
    "deformable_attention",
    "distillation_loss",
    "explain",
    "gated_concat",
    "gated_fusion",
    "joint_attention",
    "low_rank_fusion",
    "merge_attention",
    "merge_embeddings",
    "modulated_norm",
    "multimodal_cross_entropy",
    "multiplicative_attention_pool",
    "nn",
    "norm_rotary",
    "scaled_dot_product_attention",
    "sigmoid_contrastive_loss",
    "split_attention_pool",
    "tensor_fusion_linear",
    "use_backend",
    "varlen_cross_attention",
]

watch_forks()
del watch_forks


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
