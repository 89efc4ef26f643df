"""Kernels for multimodal models: drop-in ops for PyTorch, each with a readable reference."""

from __future__ import annotations

from mmkernels import nn
from mmkernels._dispatch import Explanation, explain, use_backend
from mmkernels._errors import UnsupportedError
from mmkernels.ops.concat_tokens import concat_tokens
from mmkernels.ops.cross_attention import cross_attention, scaled_dot_product_attention
from mmkernels.ops.merge_embeddings import merge_embeddings
from mmkernels.ops.modulated_norm import modulated_norm

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "UnsupportedError",
    "concat_tokens",
    "cross_attention",
    "explain",
    "merge_embeddings",
    "modulated_norm",
    "nn",
    "scaled_dot_product_attention",
    "use_backend",
]
