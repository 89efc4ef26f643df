"""The fusion layer of grounding models, over `bidirectional_cross_attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops.bidirectional_cross_attention import bidirectional_cross_attention

__all__ = ["BidirectionalCrossAttention"]


class BidirectionalCrossAttention(nn.Module):
    """Two sequences that attend to each other, each with projections of its own and a residual that it scales.

        x ← x + γ_x ∘ out_proj_x(attention of x to y),   y ← y + γ_y ∘ out_proj_y(attention of y to x)

    on normalised inputs, by one matrix of scores: the deep fusion of image and text of Li et al., "Grounded
    Language-Image Pre-training", 2021 (arXiv:2112.03857), and Grounding DINO (arXiv:2303.05499).

    Args:
        x_dim: features of x's tokens.
        y_dim: features of y's tokens.
        embed_dim: features of all heads together.
        num_heads: H; divides embed_dim.
        layer_scale: initial value of γ_x (x_dim,) and γ_y (y_dim,), learned scales of the two directions; None: no
            scales, the outputs are added as they are.
        clamp: bound of the scores, as in `bidirectional_cross_attention`.
        bias: whether the projections have biases.
        eps: of the layer norms of the inputs.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> fuse = BidirectionalCrossAttention(256, 768, 1024, 4)
        >>> image, text = fuse(torch.randn(2, 900, 256), torch.randn(2, 32, 768))
        >>> image.shape, text.shape
        (torch.Size([2, 900, 256]), torch.Size([2, 32, 768]))
    """

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        embed_dim: int,
        num_heads: int,
        *,
        layer_scale: float | None = 1e-4,
        clamp: float | None = 50000.0,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("BidirectionalCrossAttention", x_dim=x_dim, y_dim=y_dim, embed_dim=embed_dim)
        check_sizes("BidirectionalCrossAttention", 1, num_heads=num_heads)
        if embed_dim % num_heads != 0:
            expected = f"a multiple of num_heads, {num_heads}"
            raise ValueError(f"BidirectionalCrossAttention: embed_dim: expected {expected}; got {embed_dim}")
        self.x_dim, self.y_dim, self.embed_dim, self.num_heads = x_dim, y_dim, embed_dim, num_heads
        self.layer_scale = layer_scale
        self.clamp = clamp

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        def scales(features: int) -> nn.Parameter | None:
            return None if layer_scale is None else nn.Parameter(torch.empty(features, device=device, dtype=dtype))

        self.x_norm = nn.LayerNorm(x_dim, eps=eps, device=device, dtype=dtype)
        self.y_norm = nn.LayerNorm(y_dim, eps=eps, device=device, dtype=dtype)
        self.x_in_proj = linear(x_dim, 2 * embed_dim)  # x_query and x_value
        self.y_in_proj = linear(y_dim, 2 * embed_dim)  # y_key and y_value
        self.x_out_proj = linear(embed_dim, x_dim)
        self.y_out_proj = linear(embed_dim, y_dim)
        self.x_scale = scales(x_dim)
        self.y_scale = scales(y_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections Xavier-uniform with biases 0, norms 1 and 0, scales ``layer_scale``."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm):
                layer.reset_parameters()
        for scale in (self.x_scale, self.y_scale):
            if scale is not None and self.layer_scale is not None:
                nn.init.constant_(scale, self.layer_scale)

    @leaf_of_traces
    def forward(
        self, x: Tensor, y: Tensor, *, x_mask: Tensor | None = None, y_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both sequences after the fusion.

        Args:
            x: (B, Lx, x_dim).
            y: (B, Ly, y_dim).
            x_mask: (B, Lx) bool, True = a real token, as in `bidirectional_cross_attention`.
            y_mask: (B, Ly) bool.

        Returns:
            (B, Lx, x_dim) and (B, Ly, y_dim).

        Raises:
            ValueError, TypeError, RuntimeError: as `bidirectional_cross_attention`.
        """
        x_query, x_value = self._heads(self.x_in_proj(self.x_norm(x)))
        y_key, y_value = self._heads(self.y_in_proj(self.y_norm(y)))
        x_out, y_out = bidirectional_cross_attention(
            x_query, y_key, x_value, y_value, x_mask=x_mask, y_mask=y_mask, clamp=self.clamp
        )
        x_out = self.x_out_proj(x_out.transpose(1, 2).flatten(2))
        y_out = self.y_out_proj(y_out.transpose(1, 2).flatten(2))
        if self.x_scale is not None and self.y_scale is not None:
            return torch.addcmul(x, self.x_scale, x_out), torch.addcmul(y, self.y_scale, y_out)
        return x + x_out, y + y_out

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Two views [B, H, L, D] of a projection [B, L, 2·E]."""
        first, second = projected.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return first.transpose(1, 2), second.transpose(1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.x_dim}, {self.y_dim}, {self.embed_dim}, num_heads={self.num_heads}, "
            f"layer_scale={self.layer_scale}, clamp={self.clamp}"
        )
