"""Knowledge distillation as a module, over `distillation_loss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.ops._labels import check_ignore_index
from mmkernels.ops.distillation_loss import check_options, distillation_loss

__all__ = ["DistillationLoss"]


class DistillationLoss(nn.Module):
    """The divergence between a student's and a teacher's softened predictions: `distillation_loss`.

    Args:
        temperature: T > 0.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: of the jsd.
        ignore_index: the label of rows that do not count.

    Example:
        >>> criterion = DistillationLoss(temperature=2.0)
        >>> criterion(torch.randn(8, 50), torch.randn(8, 50)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        kind: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
        beta: float = 0.5,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.temperature, self.beta = check_options("DistillationLoss", temperature, kind, beta)
        self.kind: Literal["forward_kl", "reverse_kl", "jsd"] = kind
        self.ignore_index = check_ignore_index("DistillationLoss", ignore_index)

    @leaf_of_traces
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        *,
        linear: Sequence[tuple[Tensor, Tensor | None]] | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student: logits (…, V); with ``linear`` hidden states (…, D_s).
            teacher: logits (…, V); with ``linear`` hidden states (…, D_t).
            labels: (…) integers; rows whose label is ignore_index do not count.
            linear: two heads (weight, bias or None), as in `distillation_loss`.

        Raises:
            ValueError, TypeError, RuntimeError: as `distillation_loss`.
        """
        return distillation_loss(
            student,
            teacher,
            temperature=self.temperature,
            kind=self.kind,
            beta=self.beta,
            labels=labels,
            ignore_index=self.ignore_index,
            linear=linear,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, kind={self.kind!r}, beta={self.beta:g}"
