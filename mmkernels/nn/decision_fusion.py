"""Late fusion as a layer, over `decision_fusion`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops import _checks as checks
from mmkernels.ops.decision_fusion import check_method, decision_fusion
from mmkernels.ops.decision_fusion.reference import shares_of_present

__all__ = ["DecisionFusion"]


def _numbers(module: str, weights: Any) -> tuple[float, ...]:
    if isinstance(weights, str) or not isinstance(weights, (Sequence, Tensor)):
        raise checks.type_error(module, "weights", "a list of numbers", type(weights).__name__)
    return tuple(checks.check_number(module, f"weights[{i}]", w) for i, w in enumerate(weights))


class DecisionFusion(nn.Module):
    """One decision from the logits of several classifiers, and each modality's share in it: `decision_fusion`.

    Args:
        num_modalities: M.
        method: "mean", "log", "product", "max" or "vote".
        weights: M fixed weights; None = all alike.
        learnable: whether the weights are learned, as softmax(``weight``); they begin as ``weights``, divided by their
            sum. Of "mean" and "log" alone.
        device, dtype: of the weights.

    Example:
        >>> fuse = DecisionFusion(2, method="log", learnable=True)
        >>> probabilities, shares = fuse([torch.randn(8, 10), torch.randn(8, 10)])
        >>> probabilities.shape, shares.shape
        (torch.Size([8, 10]), torch.Size([8, 2]))
    """

    weight: Tensor | None

    def __init__(
        self,
        num_modalities: int,
        *,
        method: Literal["mean", "log", "product", "max", "vote"] = "mean",
        weights: Sequence[float] | None = None,
        learnable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "DecisionFusion"
        check_sizes(name, 1, num_modalities=num_modalities)
        check_method(name, method)
        numbers = None if weights is None else _numbers(name, weights)
        if numbers is not None and len(numbers) != num_modalities:
            raise checks.value_error(name, "weights", f"{num_modalities} numbers, one per modality", len(numbers))
        if learnable and method not in ("mean", "log"):
            raise checks.value_error(name, "learnable", f"False for the method {method!r}", learnable)
        if learnable and numbers is not None and not all(0 < w < math.inf for w in numbers):
            raise checks.value_error(name, "weights", "finite numbers > 0 to learn from", numbers)
        self.num_modalities = num_modalities
        self.method: Literal["mean", "log", "product", "max", "vote"] = method
        self.learnable = learnable
        self.initial = numbers
        empty = torch.empty(num_modalities, device=device, dtype=dtype)
        if learnable:
            self.weight = nn.Parameter(empty)
        else:
            self.register_buffer("weight", None if weights is None else empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights that the module was made with."""
        if self.weight is None:
            return
        initial = torch.tensor(self.initial or [1.0] * self.num_modalities)
        with torch.no_grad():
            self.weight.copy_((initial / initial.sum()).log() if self.learnable else initial)

    @leaf_of_traces
    def forward(self, logits: Sequence[Tensor], presence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fuse the decisions.

        Args:
            logits: M tensors (B, C).
            presence: (B, M) or (M,) bool, True where a modality was observed; None = all were.

        Returns:
            Probabilities (B, C) as `decision_fusion` makes them, and shares (B, M), without gradient: how much of the
            support for the class that won came from each modality. For "mean", "log" and "product" that is its
            probability of the class times its weight; for "max" only that of the modalities that were the maximum,
            for "vote" the weight of those that voted for the class. They sum to 1; 0 where a modality is absent.

        Raises:
            ValueError, TypeError, RuntimeError: as `decision_fusion`.
        """
        if isinstance(logits, (list, tuple)) and len(logits) != self.num_modalities:
            raise checks.value_error("DecisionFusion", "logits", f"{self.num_modalities} modalities", len(logits))
        weights = self._weights()
        probabilities = decision_fusion(logits, weights, method=self.method, presence=presence)
        return probabilities, self._shares(logits, weights, presence, probabilities)

    def _weights(self) -> Tensor | None:
        if self.weight is None:
            return None
        return torch.softmax(self.weight, 0) if self.learnable else self.weight

    @torch.no_grad()
    def _shares(
        self, logits: Sequence[Tensor], weights: Tensor | None, presence: Tensor | None, probabilities: Tensor
    ) -> Tensor:
        if probabilities.shape[1] == 0:
            return probabilities.new_zeros((probabilities.shape[0], len(logits)))
        won = probabilities.argmax(-1, keepdim=True)  # [B, 1]
        support, there, voted = [], [], []
        for z in logits:
            wide = z if z.dtype == torch.float64 else z.float()
            support.append((wide.gather(1, won) - wide.logsumexp(-1, keepdim=True)).exp())
            there.append((z != -torch.inf).any(-1, keepdim=True))
            voted.append(z.argmax(-1, keepdim=True) == won)
        present = torch.cat(there, 1) if presence is None else torch.cat(there, 1) & presence
        given = torch.cat(support, 1).masked_fill(~present, 0)  # [B, M]
        if self.method == "max":
            given = given.masked_fill(given < given.amax(1, keepdim=True), 0)
        elif self.method != "product":
            shares = shares_of_present(weights, present, given.dtype)
            given = (torch.cat(voted, 1) if self.method == "vote" else given) * shares
        total = given.sum(1, keepdim=True)
        return (given / total.masked_fill(total == 0, 1)).to(probabilities.dtype)

    def extra_repr(self) -> str:
        initial = "" if self.initial is None else f", weights={self.initial}"
        return f"{self.num_modalities}, method={self.method!r}{initial}, learnable={self.learnable}"
