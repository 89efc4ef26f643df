"""The losses of modalities and their balance as a module, over `multimodal_cross_entropy`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import leaf_of_traces
from mmkernels.nn._arguments import check_sizes
from mmkernels.ops import _checks as checks
from mmkernels.ops._labels import check_ignore_index
from mmkernels.ops.multimodal_cross_entropy import check_options, multimodal_cross_entropy
from mmkernels.ops.multimodal_cross_entropy.op import multimodal_cross_entropy_op

__all__ = ["MultimodalCrossEntropy"]

_NAME = "MultimodalCrossEntropy"
_BALANCES = ("uncertainty", "given", "ogm")


def _float32_losses(logits: Any) -> AbstractContextManager[Any]:
    """Where losses of logits in half precision are float32: autocast to the dtype that these have already."""
    first = logits[0] if isinstance(logits, (list, tuple)) and logits else None
    if not isinstance(first, Tensor) or first.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return nullcontext() if checks.autocast_is_on(first.device) else torch.autocast(first.device.type, first.dtype)


class MultimodalCrossEntropy(nn.Module):
    """A cross-entropy for each modality's own prediction, and their balanced sum.

    ``balance`` says how no modality outruns the others:

    - "uncertainty": Σ e^(−s_i) CE_i + s_i with learned s, the parameter ``log_vars`` (Kendall et al., 2018,
      arXiv:1705.07115).
    - "given": Σ w_i CE_i with the constructor's weights.
    - "ogm": Σ w_i CE_i, and while training the gradient of the modality that is ahead is slowed, as in OGM-GE (Peng et
      al., "Balanced Multimodal Learning via On-the-fly Gradient Modulation", 2022, arXiv:2203.15332): with c_i the mean
      probability of the label over the valid rows and ρ_i = c_i / mean of the other modalities' c,

          k_i = 1 − tanh(α ρ_i) where ρ_i > 1, else 1

      multiplies the gradient that flows to the modality's logits. Of two modalities these are the paper's ρ and k.
      Modalities without a valid row take no part. The paper's second half, Gaussian noise on the gradients of the
      encoders' parameters (GE), is the optimizer step's to add: a loss does not see these.

    Args:
        num_modalities: M.
        balance: "uncertainty", "given" or "ogm".
        weights: M numbers w, of "given" and "ogm"; default: ones. Kept as a buffer.
        alpha: α of "ogm", at least 0.
        label_smoothing, ignore_index, robust, q: as in `multimodal_cross_entropy`.
        device, dtype: of ``log_vars`` and ``weights``.

    Example:
        >>> loss = MultimodalCrossEntropy(2, balance="ogm")
        >>> total, each = loss([torch.randn(8, 10), torch.randn(8, 10)], torch.arange(8))
        >>> each.shape, loss.coefficients([torch.randn(8, 10), torch.randn(8, 10)], torch.arange(8)).shape
        (torch.Size([2]), torch.Size([2]))
    """

    log_vars: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        num_modalities: int,
        balance: Literal["uncertainty", "given", "ogm"] = "uncertainty",
        *,
        weights: Sequence[float] | Tensor | None = None,
        alpha: float = 0.1,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        robust: Literal["gce", "symmetric"] | None = None,
        q: float = 0.7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(_NAME, 1, num_modalities=num_modalities)
        expected = "'uncertainty', 'given' or 'ogm'"
        if not isinstance(balance, str):
            raise checks.type_error(_NAME, "balance", expected, type(balance).__name__)
        if balance not in _BALANCES:
            raise checks.value_error(_NAME, "balance", expected, repr(balance))
        if balance == "uncertainty" and weights is not None:
            raise checks.value_error(_NAME, "weights", "None with balance='uncertainty', which learns them", "weights")
        self.num_modalities = num_modalities
        self.balance = balance
        self.alpha = checks.check_number(_NAME, "alpha", alpha)
        if not self.alpha >= 0:
            raise checks.value_error(_NAME, "alpha", "a number ≥ 0", alpha)
        self.label_smoothing, self.q = check_options(_NAME, label_smoothing, robust, q)
        self.ignore_index = check_ignore_index(_NAME, ignore_index)
        self.robust = robust
        learned = balance == "uncertainty"
        empty = torch.empty(num_modalities, device=device, dtype=dtype)
        self.register_parameter("log_vars", nn.Parameter(empty) if learned else None)
        given = None
        if not learned:
            if isinstance(weights, str):
                raise checks.type_error(_NAME, "weights", "a list of numbers", "str")
            given = torch.ones_like(empty) if weights is None else torch.as_tensor(weights).detach().to(empty)
            if given.shape != (num_modalities,):
                expected = f"{num_modalities} numbers, one for each modality"
                raise checks.value_error(_NAME, "weights", expected, f"shape {tuple(given.shape)}")
            given = given.clone()
        self.register_buffer("weights", given)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero: every loss counts once."""
        if self.log_vars is not None:
            nn.init.zeros_(self.log_vars)

    @torch.no_grad()
    def coefficients(
        self,
        logits: Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        *,
        presence: Tensor | None = None,
        linear: Sequence[tuple[Tensor, Tensor | None]] | None = None,
    ) -> Tensor:
        """OGM-GE's k, (M,) float32, or float64 of float64 logits: 1 for a modality that is not ahead of the others."""
        missing = self._missing(logits, labels, presence, linear)
        counts = self._valid_rows(labels, presence) > 0
        score = torch.where(counts, 1 - missing, 0)
        rivals = counts.sum() - counts.to(score.dtype)
        others = (score.sum() - score) / rivals.clamp(min=1)
        ahead = counts & (rivals > 0) & (score > others)
        ratio = torch.where(ahead, score / others.clamp(min=torch.finfo(score.dtype).tiny), 0)
        return 1 - torch.tanh(self.alpha * ratio)

    def _missing(self, logits: Any, labels: Any, presence: Any, linear: Any) -> Tensor:
        """The mean of 1 − p[y], which is the generalised cross-entropy of q = 1, in float32 at least."""
        if linear is None and may_use_door():
            targets = labels if isinstance(labels, (list, tuple)) else [labels]
            options = 0.0, self.ignore_index, "gce", 1.0, True
            out = multimodal_cross_entropy_op.unchecked(logits, targets, None, None, presence, None, *options)
            if out is not None:
                return out[1]
        with _float32_losses(logits):
            return multimodal_cross_entropy(
                logits, labels, robust="gce", q=1.0, ignore_index=self.ignore_index, presence=presence, linear=linear
            )[1]

    def _valid_rows(self, labels: Tensor | Sequence[Tensor], presence: Tensor | None) -> Tensor:
        """How many rows are valid, (M,)."""
        each: list[Tensor] = list(labels) if isinstance(labels, (list, tuple)) else [labels]  # type: ignore[list-item]
        valid = torch.stack([y.to(torch.int64).ne(self.ignore_index) for y in each], 1)  # [B, M], or [B, 1]
        return (valid if presence is None else valid & presence).sum(0).expand(self.num_modalities)

    @leaf_of_traces
    def forward(
        self,
        logits: Sequence[Tensor],
        labels: Tensor | Sequence[Tensor],
        *,
        presence: Tensor | None = None,
        linear: Sequence[tuple[Tensor, Tensor | None]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The total loss and those of the modalities.

        Args:
            logits: M tensors (B, C_i); with ``linear`` hidden states (B, D_i).
            labels: (B,), or M such.
            presence: (B, M) or (M,) bool, True where a modality was observed.
            linear: heads (weight, bias or None), as in `multimodal_cross_entropy`.

        Returns:
            total () and the losses (M,), both differentiable.

        Raises:
            ValueError, TypeError, RuntimeError: as `multimodal_cross_entropy`.
        """
        if isinstance(logits, (list, tuple)) and len(logits) != self.num_modalities:
            raise checks.value_error(_NAME, "logits", f"{self.num_modalities} modalities", len(logits))
        modulation = None
        if self.balance == "ogm" and self.training:
            modulation = self.coefficients(logits, labels, presence=presence, linear=linear)
        first = logits[0] if isinstance(logits, (list, tuple)) else None

        def fitting(vector: Tensor | None) -> Tensor | None:
            """In a dtype that the op takes beside these logits."""
            if vector is None or not isinstance(first, Tensor) or vector.dtype in (torch.float32, first.dtype):
                return vector
            return vector.to(torch.promote_types(first.dtype, torch.float32))

        return multimodal_cross_entropy(
            logits,
            labels,
            weights=fitting(self.weights),
            log_vars=fitting(self.log_vars),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            presence=presence,
            robust=self.robust,
            q=self.q,
            modulation=modulation,
            linear=linear,
        )

    def extra_repr(self) -> str:
        text = f"{self.num_modalities}, balance={self.balance!r}"
        if self.balance == "ogm":
            text += f", alpha={self.alpha:g}"
        if self.label_smoothing:
            text += f", label_smoothing={self.label_smoothing:g}"
        if self.robust is not None:
            text += f", robust={self.robust!r}"
        return text + (f", q={self.q:g}" if self.robust == "gce" else "")
