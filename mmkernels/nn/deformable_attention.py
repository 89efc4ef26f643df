"""Multi-scale deformable attention as a layer, over `deformable_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import is_spread, leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops.deformable_attention import deformable_attention

__all__ = ["DeformableAttention"]


class DeformableAttention(nn.Module):
    """Queries that attend to few places of each level of a feature pyramid, at offsets from their reference points.

    Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection", 2020, arXiv:2010.04159.
    Offsets and weights come from the query; the names and shapes of the parameters are those of that paper's code and
    of ``MultiScaleDeformableAttention`` in mmcv, so that its state dicts load.

    Args:
        embed_dim: E, features of queries, pixels and output.
        num_heads: H, a divisor of E.
        num_levels: L.
        num_points: P, of each level.
        method: as in `deformable_attention`.
        bias: whether the projections of values and output have biases.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> attend = DeformableAttention(64, num_heads=8, num_levels=2, num_points=4)
        >>> pixels, queries = torch.randn(1, 8 * 8 + 4 * 4, 64), torch.randn(1, 5, 64)
        >>> attend(queries, pixels, torch.rand(1, 5, 2, 2), [(8, 8), (4, 4)]).shape
        torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        *,
        method: Literal["bilinear", "discrete"] = "bilinear",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_levels": num_levels, "num_points": num_points}
        check_sizes("DeformableAttention", 1, **sizes)
        if embed_dim % num_heads != 0:
            expected = f"a multiple of num_heads, {num_heads}"
            raise ValueError(f"DeformableAttention: embed_dim: expected {expected}; got {embed_dim}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.method: Literal["bilinear", "discrete"] = method
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2, device=device, dtype=dtype)
        self.attention_weights = nn.Linear(embed_dim, samples, device=device, dtype=dtype)
        self.value_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.output_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the paper: at first every head looks in a direction of its own, point p at p + 1 pixels' distance, all
        equally weighted, whatever the query."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)  # [H, 2], on a square
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]  # [H, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.weight) if layer is self.attention_weights else nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @leaf_of_traces
    def forward(
        self,
        query: Tensor,
        value: Tensor | Sequence[Tensor],
        reference_points: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        *,
        value_mask: Tensor | Sequence[Tensor | None] | None = None,
        presence: Tensor | None = None,
    ) -> Tensor:
        """The attention of every query.

        Args:
            query: (B, Lq, E); add position embeddings before.
            value: (B, S, E), the pixels of all levels, or a list of such, one per source, as in
                `deformable_attention`.
            reference_points: (B, Lq, L, 2) as (x, y) in 0 … 1, offsets from which count pixels; or (B, Lq, L, 4), boxes
                (x, y, width, height), offsets from whose centres count halves of a box over num_points. L may be 1.
            spatial_shapes: as in `deformable_attention`.
            value_mask: (B, S) bool, True = a real pixel; the values of others are 0. A list for a list of values.
            presence: as in `deformable_attention`.

        Returns:
            (B, Lq, E).

        Raises:
            ValueError, TypeError, RuntimeError: as `deformable_attention`, and for reference points that do not fit.
        """
        self._check(query, reference_points)
        listed = isinstance(value, (list, tuple))
        values: list[Tensor] = list(value) if listed else [value]  # type: ignore[arg-type,list-item]
        masks: list[Tensor | None] = list(value_mask) if isinstance(value_mask, (list, tuple)) else [value_mask]  # type: ignore[list-item]
        if value_mask is None:
            masks = [None] * len(values)
        if len(masks) != len(values):
            expected = f"as many masks as values, {len(values)}"
            raise ValueError(f"DeformableAttention: value_mask: expected {expected}; got {len(masks)}")
        heads = [self._heads(x, mask) for x, mask in zip(values, masks, strict=True)]
        size = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*size, 2))  # [B, Lq, H, L, P, 2]
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1).unflatten(-1, size[1:])
        centres = reference_points[:, :, None, :, None, :2]  # [B, Lq, 1, L, 1, 2]
        if reference_points.shape[-1] == 2:
            locations = centres + offsets / self._sizes(spatial_shapes, offsets)
        else:
            locations = centres + offsets * (reference_points[:, :, None, :, None, 2:] * (0.5 / self.num_points))
        out = deformable_attention(
            heads if listed else heads[0],
            spatial_shapes,
            locations.to(heads[0].dtype) if locations.dtype != torch.float32 else locations,
            weights.to(heads[0].dtype),
            method=self.method,
            presence=presence,
        )
        return self.output_proj(out)

    def _check(self, query: Tensor, reference_points: Tensor) -> None:
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            expected = f"shape (B, Lq, {self.embed_dim})"
            raise ValueError(f"DeformableAttention: query: expected {expected}; got {tuple(query.shape)}")
        shape = reference_points.shape
        fits = len(shape) == 4 and shape[:2] == query.shape[:2] and shape[2] in (1, self.num_levels)
        if not fits or shape[3] not in (2, 4):
            expected = f"shape {(*query.shape[:2], self.num_levels)} and 2 or 4 numbers"
            raise ValueError(f"DeformableAttention: reference_points: expected {expected}; got {tuple(shape)}")

    def _heads(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, S, H, D]."""
        projected = self.value_proj(value)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"DeformableAttention: value_mask: expected dtype torch.bool; got {mask.dtype}")
            projected = projected.masked_fill(~mask.unsqueeze(-1), 0)
        return projected.unflatten(-1, (self.num_heads, -1))

    @staticmethod
    def _sizes(spatial_shapes: Sequence[Sequence[int]] | Tensor, offsets: Tensor) -> Tensor:
        """Width and height of every level, [L, 1, 2]."""
        if isinstance(spatial_shapes, Tensor):
            sizes = spatial_shapes.to(offsets.device, offsets.dtype)
        else:
            sizes = torch.tensor([list(s) for s in spatial_shapes], device=offsets.device, dtype=offsets.dtype)
        if is_spread(offsets) and not is_spread(sizes):
            from torch.distributed.tensor import DTensor, Replicate  # imported by now

            mesh = offsets.device_mesh  # type: ignore[attr-defined]
            sizes = DTensor.from_local(sizes, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return sizes.reshape(-1, 2).flip(-1).unsqueeze(1)

    def extra_repr(self) -> str:
        method = "" if self.method == "bilinear" else f", method={self.method!r}"
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={self.num_points}{method}"
        )
