"""`nn.MultiheadAttention` over `cross_attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops._checks import autocast_is_on, check_tensor, type_error, value_error
from mmkernels.ops._products import matmul
from mmkernels.ops.cross_attention import cross_attention
from mmkernels.ops.cross_attention.op import cross_attention_op

__all__ = ["MultiheadCrossAttention"]


class MultiheadCrossAttention(nn.MultiheadAttention):
    """Drop-in for ``torch.nn.MultiheadAttention``: same constructor, state dict and forward signature.

    The heads are views of the projections, (B, L, H, D) read as (B, H, L, D), and attention's output comes back in that
    memory order: nothing is transposed in memory. Without ``need_weights`` the Lq×Lk weights are never held.

    Args:
        embed_dim: E, features of the query and of the output; a multiple of ``num_heads``.
        num_heads: H.
        dropout: probability of dropping an attention weight while training.
        bias: whether the projections have biases.
        add_bias_kv: append a learned token to key and value.
        add_zero_attn: append a zero token to key and value.
        kdim: features of the key; None = E.
        vdim: features of the value; None = E.
        batch_first: (B, L, E) instead of (L, B, E).
        device, dtype: of the parameters.

    Example:
        >>> attend = MultiheadCrossAttention(512, 8, kdim=1024, vdim=1024, batch_first=True)
        >>> text, image = torch.randn(2, 77, 512), torch.randn(2, 576, 1024)
        >>> attend(text, image, image, need_weights=False)[0].shape
        torch.Size([2, 77, 512])
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        check_sizes("MultiheadCrossAttention", 1, embed_dim=embed_dim, num_heads=num_heads)
        if embed_dim % num_heads != 0:
            expected = f"a multiple of num_heads, {num_heads}"
            raise value_error("MultiheadCrossAttention", "embed_dim", expected, embed_dim)
        super().__init__(embed_dim, num_heads, *args, **kwargs)

    @leaf_of_traces
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        Args:
            query: (Lq, B, E), or (B, Lq, E) with batch_first, or (Lq, E).
            key: (Lk, B, kdim), or (B, Lk, kdim), or (Lk, kdim).
            value: (Lk, B, vdim), or (B, Lk, vdim), or (Lk, vdim).
            key_padding_mask: (B, Lk), or (Lk,) for unbatched input: True = ignore that key; float = added.
            need_weights: also return the weights, which are then computed plainly, in O(Lq·Lk) memory. As in torch this
                is the default; pass False for speed.
            attn_mask: (Lq, Lk) or (B·H, Lq, Lk): True = do not attend, the opposite of `cross_attention`'s; float =
                added.
            average_attn_weights: average the weights over heads.
            is_causal: a promise that ``attn_mask`` is the causal mask; it is then not read. Without ``attn_mask``,
                attention is causal.

        Returns:
            The output, shaped as query, and the weights: (B, Lq, Lk), or (B, H, Lq, Lk) without averaging, less B for
            unbatched input; None unless ``need_weights``. A query that may attend to nothing gives zeros (before the
            output projection), where torch gives NaN.

        Raises:
            ValueError, TypeError, RuntimeError: as `cross_attention`.
        """
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            shapes = [tuple(x.shape) for x in (query, key, value)]
            raise ValueError(f"MultiheadCrossAttention: query, key, value: expected 2 or 3 dims alike; got {shapes}")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                _check_mask_dtype(name, mask)
        if need_weights:
            cross_attention_op.forward.explain_reference("need_weights=True forms the weights in plain PyTorch")
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (_appended(x, b, batched, self.batch_first) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            zero = k.new_zeros(1, 1, self.embed_dim)
            k, v = (_appended(x, zero, batched, self.batch_first) for x in (k, v))
        q, k, v = (self._heads(x, batched) for x in (q, k, v))  # [B, H, L, D]
        for name, x, expected in (("key", k, q.shape[0]), ("value", v, k.shape[0])):
            if x.shape[0] != expected:
                raise value_error("MultiheadCrossAttention", name, f"a batch of {expected}", x.shape[0])
        if v.shape[2] != k.shape[2]:
            raise value_error("MultiheadCrossAttention", "value", f"{k.shape[2]} tokens as in key", v.shape[2])

        appended = (self.bias_k is not None) + self.add_zero_attn
        causal = is_causal and not (appended or need_weights)
        if is_causal and attn_mask is None and not causal:
            attn_mask = torch.ones(q.shape[2], k.shape[2] - appended, dtype=torch.bool, device=q.device).triu(1)
        mask = self._merged_mask(None if causal else attn_mask, key_padding_mask, q, k, appended)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(_attention_weights(q, k, mask), dropout_p)
            out = matmul(weights.to(v.dtype), v)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = cross_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout_p)
        if not batched:
            merged = out.squeeze(0).transpose(0, 1)  # [L, H, D]
        else:
            merged = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(merged.flatten(-2)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections; tensors that are one and the same are projected by one product."""
        width, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
            return q, k, v
        weight = self.in_proj_weight
        if key is value:
            if query is key:
                q, k, v = F.linear(query, weight, bias).chunk(3, -1)
                return q, k, v
            q = F.linear(query, weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
            return q, k, v
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True))
        return q, k, v

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """A view of projected tokens as [B, H, L, D]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merged_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor, appended: int
    ) -> Tensor | None:
        """Both masks as one, True = attend or float, [1|B, 1|H, 1|Lq, Lk]; appended keys are open to all."""
        batch, heads, query_len, _ = q.shape
        masks = []
        if attn_mask is not None:
            shape = (query_len, k.shape[2] - appended)
            if tuple(attn_mask.shape) not in (shape, (batch * heads, *shape)):
                expected = f"shape {shape} or {(batch * heads, *shape)}"
                got = tuple(attn_mask.shape)
                raise ValueError(f"MultiheadCrossAttention: attn_mask: expected {expected}; got {got}")
            masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)))
        if key_padding_mask is not None:
            shape = (batch, k.shape[2] - appended)
            padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
            if tuple(padding.shape) != shape:
                got = tuple(key_padding_mask.shape)
                raise ValueError(f"MultiheadCrossAttention: key_padding_mask: expected shape {shape}; got {got}")
            masks.append(padding[:, None, None])
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            merged = ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
            return F.pad(merged, (0, appended), value=True) if appended else merged
        dtype = q.dtype
        if autocast_is_on(q.device):
            dtype = torch.get_autocast_dtype(q.device.type)
        floats = [
            torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(dtype)
            for m in masks
        ]
        merged = floats[0] if len(floats) == 1 else floats[0] + floats[1]
        return F.pad(merged, (0, appended)) if appended else merged


def _check_mask_dtype(argument: str, mask: Tensor) -> None:
    check_tensor("MultiheadCrossAttention", argument, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise type_error("MultiheadCrossAttention", argument, "dtype bool or floating", mask.dtype)


def _appended(x: Tensor, token: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """The tokens x with one more, (1, 1, E), at the end."""
    if not batched:
        return torch.cat([x, token[0]])
    if batch_first:
        return torch.cat([x, token.expand(x.shape[0], 1, -1)], 1)
    return torch.cat([x, token.expand(1, x.shape[1], -1)])


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + mask), [B, H, Lq, Lk], in q's dtype; 0 for a row with nothing to attend to."""
    scores = matmul(q, k.mT)
    scores = scores.float() if q.dtype in (torch.bfloat16, torch.float16) else scores
    scores = scores * (q.shape[-1] ** -0.5)
    if mask is None:
        return scores.softmax(-1).to(q.dtype)
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        allowed, scores = mask != -torch.inf, scores + mask
    scores = scores.masked_fill(~allowed, -torch.inf)
    idle = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(idle, 0).softmax(-1).masked_fill(idle, 0).to(q.dtype)
