"""Attention of jagged `NestedTensor`s, whose values are a packed batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops import _checks as checks
from mmkernels.ops.varlen_cross_attention import varlen_cross_attention

_HEADS, _ROWS = 1, 2  # dims of (B, H, rows, D)


def scaled_dot_product_attention(
    query: Any,  # nested, whose methods Tensor does not declare
    key: Any,
    value: Any,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """torch's function; ours where inputs are (B, H, rows, D), ragged in their rows alone, and nothing is dropped."""
    packed = attn_mask is None and dropout_p == 0.0 and all(map(_is_packed, (query, key, value)))
    if not packed or not (enable_gqa or query.shape[_HEADS] == key.shape[_HEADS]):  # the strided layout has no shape
        scale = None if scale is None else checks.check_number("scaled_dot_product_attention", "scale", scale)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (x.values().transpose(0, 1) for x in (query, key, value))  # [rows of all, H, D]
    out = varlen_cross_attention(
        q,
        k,
        v,
        query.offsets(),
        key.offsets(),
        query._get_max_seqlen(),
        key._get_max_seqlen(),
        is_causal=is_causal,
        causal_alignment="top_left",
        scale=scale,
    )
    return torch.nested.nested_tensor_from_jagged(
        out.transpose(0, 1),
        query.offsets(),
        jagged_dim=_ROWS,
        min_seqlen=query._maybe_min_seqlen,
        max_seqlen=query._maybe_max_seqlen,
    )


def _is_packed(tensor: Any) -> bool:
    """Whether it is jagged in its rows and nowhere else, without holes between them."""
    jagged: bool = tensor.is_nested and tensor.layout == torch.jagged and tensor.dim() == 4
    return jagged and tensor._ragged_idx == _ROWS and tensor.lengths() is None
