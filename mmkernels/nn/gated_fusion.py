"""Gated multimodal unit, over `gated_fusion`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes, checked_widths
from mmkernels.ops.gated_fusion import gated_fusion

__all__ = ["GatedFusion"]


class GatedFusion(nn.Module):
    """Gated multimodal unit (Arevalo et al., 2017, arXiv:1702.01992): a mixture of modalities, gated per feature.

        h_i = tanh(W_i x_i + b_i),  z = softmax over i of (W_z [x₁; …; x_M] + b_z),  y = Σ_i z_i ∘ h_i

    and for two modalities z = σ(W_z [x₁; x₂] + b_z), y = z ∘ h₁ + (1 − z) ∘ h₂.

    Args:
        in_features: K_i, the width of each modality.
        out_features: N.
        bias: whether values and gates have biases.
        gate: "sigmoid" (two modalities alone) or "softmax"; None = "sigmoid" for two modalities, else "softmax".
        device, dtype: of the parameters.

    Example:
        >>> fuse = GatedFusion([300, 256], 64)
        >>> plot, poster = torch.randn(8, 300), torch.randn(8, 256)
        >>> fuse([plot, poster], presence=torch.rand(8, 2) > 0.2).shape
        torch.Size([8, 64])
    """

    value_biases: nn.ParameterList | None
    gate_bias: Tensor | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        gate: Literal["sigmoid", "softmax"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checked_widths("GatedFusion", "in_features", in_features)
        check_sizes("GatedFusion", out_features=out_features)
        self.out_features = out_features
        count = len(self.in_features)
        if gate is None:
            gate = "sigmoid" if count == 2 else "softmax"
        if gate not in ("sigmoid", "softmax") or (gate == "sigmoid" and count != 2):
            expected = "'softmax', or 'sigmoid' for two modalities"
            raise ValueError(f"GatedFusion: gate: expected {expected}; got {gate!r} for {count}")
        self.gate = gate

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        gates = out_features * (1 if gate == "sigmoid" else count)
        self.value_weights = nn.ParameterList([parameter(out_features, width) for width in self.in_features])
        self.value_biases = nn.ParameterList([parameter(out_features) for _ in self.in_features]) if bias else None
        self.gate_weight = parameter(gates, sum(self.in_features))
        self.register_parameter("gate_bias", parameter(gates) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, layer by layer: uniform within ±1/√(width of its input)."""
        biases: Sequence[Tensor | None] = (
            [None] * len(self.in_features) if self.value_biases is None else [*self.value_biases]
        )
        layers = [*zip(self.value_weights, biases, strict=True), (self.gate_weight, self.gate_bias)]
        for weight, bias in layers:
            bound = max(weight.shape[1], 1) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    @leaf_of_traces
    def forward(
        self, xs: Sequence[Tensor], presence: Tensor | None = None, return_gate: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Fuse the modalities.

        Args:
            xs: M tensors (*, K_i).
            presence: (*, M) or (M,) bool, True where a modality was observed; None = all were. What an absent one
                holds is never read.
            return_gate: also return what each modality is weighted by.

        Returns:
            (*, N); zeros where every modality is absent. With ``return_gate`` a pair of it and the weights (*, M, N).

        Raises:
            ValueError, TypeError, RuntimeError: as `gated_fusion`.
        """
        biases = None if self.value_biases is None else list(self.value_biases)
        weights = list(self.value_weights), biases, self.gate_weight, self.gate_bias
        return gated_fusion(xs, *weights, presence=presence, return_gate=return_gate)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.gate_bias is not None}, "
            f"gate={self.gate!r}"
        )
