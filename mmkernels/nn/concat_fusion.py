"""`nn.Linear` over several modalities, over `concat_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes, checked_widths
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._fusion_checks import Activation
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.concat_linear.reference import activate

__all__ = ["ConcatFusion"]


class ConcatFusion(nn.Module):
    """A linear layer and its activation over the concatenation of several modalities, which is never built.

        y = act([x₁; …; x_M] Wᵀ + b)

    Without learned replacements its state dict is that of ``nn.Linear(sum(in_features), out_features)``.

    Args:
        in_features: K_i, the width of each modality.
        out_features: N.
        bias: whether there is a bias.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid" or "quick_gelu".
        missing: what stands for a modality that is absent: "zeros", or "learned", a vector per modality, learned with
            the rest, that starts as zeros.
        device, dtype: of the parameters.

    Example:
        >>> fuse = ConcatFusion([300, 74, 35], 128, activation="relu", missing="learned")
        >>> text, audio, video = torch.randn(8, 300), torch.randn(8, 74), torch.randn(8, 35)
        >>> heard = torch.tensor([True, False, True])
        >>> fuse([text, audio, video], presence=heard).shape
        torch.Size([8, 128])
    """

    bias: Tensor | None
    missing_vectors: nn.ParameterList | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        activation: Activation | None = None,
        missing: Literal["zeros", "learned"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if missing not in ("zeros", "learned"):
            raise ValueError(f"ConcatFusion: missing: expected 'zeros' or 'learned'; got {missing!r}")
        self.in_features = checked_widths("ConcatFusion", "in_features", in_features)
        check_sizes("ConcatFusion", out_features=out_features)
        self.out_features = out_features
        fusion.check_activation("ConcatFusion", activation)
        self.activation = activation
        self.missing = missing
        self.weight = nn.Parameter(torch.empty(out_features, sum(self.in_features), device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        vectors = [nn.Parameter(torch.empty(width, device=device, dtype=dtype)) for width in self.in_features]
        self.missing_vectors = nn.ParameterList(vectors) if missing == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``: uniform within ±1/√K."""
        bound = max(self.weight.shape[1], 1) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        for vector in self.missing_vectors or ():
            nn.init.zeros_(vector)

    @leaf_of_traces
    def forward(self, xs: Sequence[Tensor], presence: Tensor | None = None) -> Tensor:
        """Fuse the modalities.

        Args:
            xs: M tensors (*, K_i).
            presence: (*, M) or (M,) bool, True where a modality was observed; None = all were. What an absent one
                holds is never read.

        Returns:
            (*, N).

        Raises:
            ValueError, TypeError, RuntimeError: as `concat_linear`.
        """
        if presence is None or self.missing_vectors is None:
            return concat_linear(xs, self.weight, self.bias, activation=self.activation, presence=presence)
        first = fusion.first_source("ConcatFusion", xs)
        fusion.check_presence("ConcatFusion", presence, first.shape[:-1], len(xs), first)
        # A replacement is the same for every row: it enters as its product with the weight, N wide.
        columns = self.weight.split(self.in_features, 1)
        replaced = torch.stack([w @ v for w, v in zip(columns, self.missing_vectors, strict=True)])  # [M, N]
        absent = (~presence).to(replaced.dtype)
        instead = (absent @ replaced).expand(*xs[0].shape[:-1], self.out_features)
        return activate(concat_linear(xs, self.weight, self.bias, presence=presence, residual=instead), self.activation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}, missing={self.missing!r}"
        )
