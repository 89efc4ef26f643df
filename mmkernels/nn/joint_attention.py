"""The attention of a multi-stream transformer block, over `joint_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes, checked_widths
from mmkernels.ops import _attention_checks as attention
from mmkernels.ops.concat_tokens import concat_tokens
from mmkernels.ops.joint_attention import joint_attention
from mmkernels.ops.norm_rotary import norm_rotary

__all__ = ["JointAttention"]


class JointAttention(nn.Module):
    """Streams of tokens, each with projections of its own, that attend to all of each other's tokens.

    The attention of MM-DiT blocks (Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis", 2024, arXiv:2403.03206): queries, keys and values of a stream come from one product with its own weight,
    and its output goes through its own. The heads are views of the projections: nothing is concatenated or transposed
    in memory.

    Args:
        embed_dims: E_s, features of each stream's tokens.
        num_heads: H.
        head_dim: D; None = embed_dims[0] / H.
        bias: whether the projections have biases.
        qk_norm: normalise each head's queries and keys by RMSNorm, with weights per stream.
        eps: of that norm.
        dropout: probability with which a weight of the attention is dropped in training.
        num_kv_heads: Hkv, a divisor of H: heads of keys and values that groups of query heads share; None = H.
        rotary: which features of queries and keys are rotated together, by the ``tables`` of a call: those of the two
            "halves" or neighbours, "interleaved", as in `norm_rotary`, which normalises them too; None: none are.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> attend = JointAttention([768, 1024], 12, qk_norm=True)
        >>> text, image = torch.randn(2, 77, 768), torch.randn(2, 576, 1024)
        >>> [x.shape for x in attend([text, image])]
        [torch.Size([2, 77, 768]), torch.Size([2, 576, 1024])]
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        num_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
        rotary: Literal["halves", "interleaved"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        embed_dims = checked_widths("JointAttention", "embed_dims", embed_dims, "stream")
        check_sizes("JointAttention", 1, num_heads=num_heads, **({} if head_dim is None else {"head_dim": head_dim}))
        if head_dim is None:
            if embed_dims[0] % num_heads != 0:
                expected = f"a multiple of num_heads, {num_heads} (or head_dim)"
                raise ValueError(f"JointAttention: embed_dims[0]: expected {expected}; got {embed_dims[0]}")
            head_dim = embed_dims[0] // num_heads
        if num_kv_heads is None:
            num_kv_heads = num_heads
        check_sizes("JointAttention", 1, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads != 0:
            expected = f"a divisor of num_heads, {num_heads}"
            raise ValueError(f"JointAttention: num_kv_heads: expected {expected}; got {num_kv_heads}")
        if rotary not in (None, "halves", "interleaved"):
            expected = "None, 'halves' or 'interleaved'"
            raise ValueError(f"JointAttention: rotary: expected {expected}; got {rotary!r}")
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.dropout = attention.check_dropout("JointAttention", dropout, "dropout")
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.rotary = rotary
        self.eps = eps
        width, joined = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def norm_weights() -> nn.ParameterList | None:
            weights = [nn.Parameter(torch.ones(head_dim, device=device, dtype=dtype)) for _ in embed_dims]
            return nn.ParameterList(weights) if qk_norm else None

        self.in_proj = nn.ModuleList(linear(features, joined) for features in embed_dims)
        self.out_proj = nn.ModuleList(linear(width, features) for features in embed_dims)
        self.query_norm_weights = norm_weights()
        self.key_norm_weights = norm_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections as ``nn.MultiheadAttention``: Xavier-uniform in, the default out, biases 0; norm weights 1."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for name, weight in self.in_proj.named_parameters():
            if name.endswith("weight"):
                nn.init.xavier_uniform_(weight)
        for weight in (*(self.query_norm_weights or ()), *(self.key_norm_weights or ())):
            nn.init.ones_(weight)

    @leaf_of_traces
    def forward(
        self,
        streams: Sequence[Tensor],
        *,
        key_lengths: Sequence[Tensor | None] | None = None,
        stream_bias: Tensor | None = None,
        tables: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> list[Tensor]:
        """Every stream's attention to all streams.

        Args:
            streams: (B, L_s, E_s) each.
            key_lengths: as in `joint_attention`, per stream: tokens at and beyond the length are not attended to.
            stream_bias: as in `joint_attention`, (S, S) or (H, S, S).
            tables: per stream (cos, sin) of its tokens' positions, as in `norm_rotary`, or None for one without; given
                with ``rotary``, and only then.

        Returns:
            Tensors (B, L_s, E_s).

        Raises:
            ValueError, TypeError, RuntimeError: as `joint_attention` and `norm_rotary`.
        """
        if len(streams) != len(self.embed_dims):
            raise ValueError(f"JointAttention: streams: expected {len(self.embed_dims)} tensors; got {len(streams)}")
        heads = [
            self._heads(i, x, table) for i, (x, table) in enumerate(zip(streams, self._tables(tables), strict=True))
        ]
        queries, keys, values = ([parts[j] for parts in heads] for j in range(3))
        outs = joint_attention(
            queries,
            keys,
            values,
            key_lengths=key_lengths,
            stream_bias=stream_bias,
            enable_gqa=self.num_kv_heads != self.num_heads,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return [out(y.transpose(1, 2).flatten(2)) for y, out in zip(outs, self.out_proj, strict=True)]

    def _tables(self, tables: Sequence[tuple[Tensor, Tensor] | None] | None) -> Sequence[tuple[Tensor, Tensor] | None]:
        count = len(self.embed_dims)
        if (tables is None) != (self.rotary is None):
            expected = "None without rotary" if self.rotary is None else f"(cos, sin) or None of {count} streams"
            got = "tables" if tables is not None else "None"
            raise ValueError(f"JointAttention: tables: expected {expected}; got {got}")
        if tables is None:
            return [None] * count
        if len(tables) != count:
            raise ValueError(f"JointAttention: tables: expected {count}, one per stream; got {len(tables)}")
        return tables

    def _heads(self, stream: int, x: Tensor, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Query, key and value of a stream, (B, H, L, D); those that nothing is done to are views of its projection."""
        heads = self.in_proj[stream](x).unflatten(-1, (-1, self.head_dim))  # [B, L, H + 2 Hkv, D]
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        query_norms, key_norms = self.query_norm_weights, self.key_norm_weights
        if table is not None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            q, k = norm_rotary(
                q,
                k,
                *table,
                query_weight=None if query_norms is None else query_norms[stream],
                key_weight=None if key_norms is None else key_norms[stream],
                eps=self.eps,
                interleaved=self.rotary == "interleaved",
            )
            return [q, k, v]
        if query_norms is not None and key_norms is not None:
            q = self._normalised(q, query_norms[stream])
            k = self._normalised(k, key_norms[stream])
        return [part.transpose(1, 2) for part in (q, k, v)]

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the features of a head, [B, L, H, D], in x's dtype."""
        rows = x.flatten(0, 1)  # a view: [B·L, H, D]
        normed = concat_tokens([rows], norm="rms", norm_weight=weight, eps=self.eps, out_dtype=x.dtype)
        return normed.unflatten(0, x.shape[:2])

    def extra_repr(self) -> str:
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{self.embed_dims}, {heads}, qk_norm={self.qk_norm}, dropout={self.dropout}, rotary={self.rotary!r}"
