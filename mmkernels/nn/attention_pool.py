"""Modules over the attention pools."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._pool import Modalities
from mmkernels.ops.additive_attention_pool import additive_attention_pool
from mmkernels.ops.multiplicative_attention_pool import multiplicative_attention_pool
from mmkernels.ops.split_attention_pool import split_attention_pool

__all__ = ["AdditiveAttentionPool", "MultiplicativeAttentionPool", "SplitAttentionPool"]


def _uniform(tensor: Tensor | None, width: int) -> None:
    """As ``nn.Linear`` starts a layer whose input has that width."""
    if tensor is not None:
        bound = max(width, 1) ** -0.5
        nn.init.uniform_(tensor, -bound, bound)


class AdditiveAttentionPool(nn.Module):
    """A weighted mean of modalities by additive attention: `additive_attention_pool`.

        e_i = v · tanh(W x_i + W_q q + b),  a = softmax over present i of e,  pooled = Σ_i a_i x_i

    Args:
        features: D, the width of every modality.
        hidden_features: A.
        bias: whether b is learned.
        query_features: Dq, the width of the query; None = there is none.
        device, dtype: of the parameters.

    Example:
        >>> pool = AdditiveAttentionPool(64, 32)
        >>> pooled, a = pool([torch.randn(8, 64) for _ in range(3)])
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 3]))
    """

    bias: Tensor | None
    query_weight: Tensor | None

    def __init__(
        self,
        features: int,
        hidden_features: int,
        bias: bool = True,
        *,
        query_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("AdditiveAttentionPool", features=features, hidden_features=hidden_features)
        if query_features is not None:
            check_sizes("AdditiveAttentionPool", query_features=query_features)
        self.features = features
        self.hidden_features = hidden_features
        self.query_features = query_features

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(hidden_features, features)
        self.vector = parameter(hidden_features)
        self.register_parameter("bias", parameter(hidden_features) if bias else None)
        query_weight = None if query_features is None else parameter(hidden_features, query_features)
        self.register_parameter("query_weight", query_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, layer by layer: uniform within ±1/√(width of its input)."""
        _uniform(self.weight, self.features)
        _uniform(self.bias, self.features)
        _uniform(self.query_weight, self.query_features or 0)
        _uniform(self.vector, self.hidden_features)

    @leaf_of_traces
    def forward(
        self, xs: Modalities, query: Tensor | None = None, presence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pool the modalities.

        Args:
            xs: (B, M, D), or M tensors (B, D).
            query: (B, Dq), where the module has query_features.
            presence: (B, M) or (M,) bool, True where a modality was observed; None = all were.

        Returns:
            pooled (B, D) and the weights (B, M).

        Raises:
            ValueError, TypeError, RuntimeError: as `additive_attention_pool`.
        """
        return additive_attention_pool(
            xs,
            self.weight,
            self.vector,
            bias=self.bias,
            query=query,
            query_weight=self.query_weight,
            presence=presence,
        )

    def extra_repr(self) -> str:
        sizes = f"features={self.features}, hidden_features={self.hidden_features}, bias={self.bias is not None}"
        return sizes if self.query_features is None else f"{sizes}, query_features={self.query_features}"


class MultiplicativeAttentionPool(nn.Module):
    """A weighted mean of modalities by their products with a query: `multiplicative_attention_pool`.

        e_i = scale · qᵀ W x_i,  a = softmax over present i of e,  pooled = Σ_i a_i x_i

    Args:
        features: D, the width of every modality.
        query_features: Dq, the width of the query; None = D, and no W is learned.
        scale: a number; None = 1/√D.
        device, dtype: of the parameters.

    Example:
        >>> pool = MultiplicativeAttentionPool(64, 48)
        >>> pooled, a = pool([torch.randn(8, 64) for _ in range(3)], torch.randn(8, 48))
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 3]))
    """

    weight: Tensor | None

    def __init__(
        self,
        features: int,
        query_features: int | None = None,
        *,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes("MultiplicativeAttentionPool", features=features)
        if query_features is not None:
            check_sizes("MultiplicativeAttentionPool", query_features=query_features)
        self.features = features
        self.query_features = query_features
        self.scale = scale
        weight = None
        if query_features is not None:
            weight = nn.Parameter(torch.empty((query_features, features), device=device, dtype=dtype))
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``: uniform within ±1/√Dq."""
        _uniform(self.weight, self.query_features or 0)

    @leaf_of_traces
    def forward(self, xs: Modalities, query: Tensor, presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool the modalities.

        Args:
            xs: (B, M, D), or M tensors (B, D).
            query: (B, Dq).
            presence: (B, M) or (M,) bool, True where a modality was observed; None = all were.

        Returns:
            pooled (B, D) and the weights (B, M).

        Raises:
            ValueError, TypeError, RuntimeError: as `multiplicative_attention_pool`.
        """
        return multiplicative_attention_pool(xs, query, weight=self.weight, scale=self.scale, presence=presence)

    def extra_repr(self) -> str:
        return f"features={self.features}, query_features={self.query_features}, scale={self.scale}"


class SplitAttentionPool(nn.Module):
    """A weighted mean of modalities, feature by feature, by split attention: `split_attention_pool`.

        g = Σ x_i,  z = act(W₁ g + b₁),  a = softmax over present i of (W₂ z + b₂),  pooled = Σ_i a_i ∘ x_i

    Args:
        features: D, the width of every modality.
        modalities: M.
        hidden_features: A.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid" or "quick_gelu".
        device, dtype: of the parameters.

    Example:
        >>> pool = SplitAttentionPool(64, 2, 16)
        >>> pooled, a = pool(torch.randn(8, 2, 64))
        >>> pooled.shape, a.shape
        (torch.Size([8, 64]), torch.Size([8, 2, 64]))
    """

    def __init__(
        self,
        features: int,
        modalities: int,
        hidden_features: int,
        activation: fusion.Activation | None = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fusion.check_activation("SplitAttentionPool", activation)
        check_sizes("SplitAttentionPool", features=features, hidden_features=hidden_features)
        check_sizes("SplitAttentionPool", 1, modalities=modalities)
        self.features = features
        self.modalities = modalities
        self.hidden_features = hidden_features
        self.activation = activation

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight1 = parameter(hidden_features, features)
        self.bias1 = parameter(hidden_features)
        self.weight2 = parameter(modalities * features, hidden_features)
        self.bias2 = parameter(modalities * features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, layer by layer: uniform within ±1/√(width of its input)."""
        for tensor, width in (
            (self.weight1, self.features),
            (self.bias1, self.features),
            (self.weight2, self.hidden_features),
            (self.bias2, self.hidden_features),
        ):
            _uniform(tensor, width)

    @leaf_of_traces
    def forward(self, xs: Modalities, presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool the modalities.

        Args:
            xs: (B, M, D), or M tensors (B, D).
            presence: (B, M) or (M,) bool, True where a modality was observed; None = all were.

        Returns:
            pooled (B, D) and the weights (B, M, D).

        Raises:
            ValueError, TypeError, RuntimeError: as `split_attention_pool`.
        """
        parameters = self.weight1, self.bias1, self.weight2, self.bias2
        return split_attention_pool(xs, *parameters, activation=self.activation, presence=presence)

    def extra_repr(self) -> str:
        return (
            f"features={self.features}, modalities={self.modalities}, hidden_features={self.hidden_features}, "
            f"activation={self.activation!r}"
        )
