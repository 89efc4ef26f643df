"""Modules over `tensor_fusion_linear` and `low_rank_fusion`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes, checked_widths
from mmkernels.ops.low_rank_fusion import low_rank_fusion
from mmkernels.ops.tensor_fusion_linear import tensor_fusion_linear

__all__ = ["LowRankFusion", "TensorFusion"]


class TensorFusion(nn.Module):
    """A linear layer over the outer product of the modalities, each with a leading 1: `tensor_fusion_linear`.

    Args:
        in_features: D_i, the width of each modality.
        out_features: N.
        bias: whether to add a learned bias.
        device, dtype: of the parameters.

    The weight (N, Π(D_i + 1)) and the bias (N,) start as those of ``nn.Linear``.

    Example:
        >>> fuse = TensorFusion([32, 16, 8], 64)
        >>> fuse([torch.randn(4, 32), torch.randn(4, 16), torch.randn(4, 8)]).shape
        torch.Size([4, 64])
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checked_widths("TensorFusion", "in_features", in_features)
        check_sizes("TensorFusion", out_features=out_features)
        self.out_features = out_features
        features = math.prod(width + 1 for width in self.in_features)
        self.weight = nn.Parameter(torch.empty(out_features, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @leaf_of_traces
    def forward(self, xs: Sequence[Tensor], presence: Tensor | None = None) -> Tensor:
        """Fuse the modalities.

        Args:
            xs: M tensors (*, D_i).
            presence: (*, M) or (M,) bool, True where a modality was observed; None = all were. An absent one counts as
                zeros, whatever it holds; its appended 1 stays.

        Returns:
            (*, N).
        """
        return tensor_fusion_linear(xs, self.weight, self.bias, presence=presence)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowRankFusion(nn.Module):
    """Tensor fusion with a weight of low rank: `low_rank_fusion`.

    Args:
        in_features: D_i, the width of each modality.
        out_features: N.
        rank: R, the number of terms.
        bias: whether to add a learned bias.
        device, dtype: of the parameters.

    Factors and rank weights start as in the authors' code, Xavier normal with a factor's fans taken over the features
    and outputs of one rank; the bias at zero.

    Example:
        >>> fuse = LowRankFusion([32, 16, 8], 64, rank=4)
        >>> fuse([torch.randn(4, 32), torch.randn(4, 16), torch.randn(4, 8)]).shape
        torch.Size([4, 64])
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checked_widths("LowRankFusion", "in_features", in_features)
        check_sizes("LowRankFusion", out_features=out_features, rank=rank)
        self.out_features = out_features
        self.rank = rank
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(rank, width + 1, out_features, device=device, dtype=dtype))
            for width in self.in_features
        )
        self.rank_weights = nn.Parameter(torch.empty(rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for factor, width in zip(self.factors, self.in_features, strict=True):
            nn.init.normal_(factor, std=math.sqrt(2 / (width + 1 + self.out_features)))
        nn.init.normal_(self.rank_weights, std=math.sqrt(2 / (1 + self.rank)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @leaf_of_traces
    def forward(self, xs: Sequence[Tensor], presence: Tensor | None = None) -> Tensor:
        """Fuse the modalities.

        Args:
            xs: M tensors (*, D_i).
            presence: (*, M) or (M,) bool, True where a modality was observed; None = all were. An absent one counts as
                zeros, whatever it holds; its appended 1 stays.

        Returns:
            (*, N).
        """
        return low_rank_fusion(xs, list(self.factors), self.rank_weights, self.bias, presence=presence)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}, bias={self.bias is not None}"
