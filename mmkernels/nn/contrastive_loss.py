"""Contrastive losses of paired embeddings as modules, over `contrastive_loss` and `sigmoid_contrastive_loss`."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels._overrides import leaf_of_traces
from mmkernels.ops import _checks as checks
from mmkernels.ops._contrastive import check_flag
from mmkernels.ops.contrastive_loss import contrastive_loss
from mmkernels.ops.sigmoid_contrastive_loss import sigmoid_contrastive_loss

__all__ = ["ContrastiveLoss", "SigmoidContrastiveLoss"]

_DEFAULT_GROUP = "default"  # stands for it in pickles


def _positive(module: str, argument: str, value: float) -> float:
    number = checks.check_number(module, argument, value)
    if not 0.0 < number < math.inf:
        raise checks.value_error(module, argument, "a finite number > 0", number)
    return number


class _PairLoss(nn.Module):
    """What both losses have: a learned scale, kept as its logarithm, and a process group.

    Copies share the group. Pickled, the default group is that of the program which loads the module; other groups
    cannot be found again there, and are refused.
    """

    def __init__(
        self,
        module: str,
        init_logit_scale: float,
        normalize: bool,
        group: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.init_logit_scale = _positive(module, "init_logit_scale", init_logit_scale)
        self.normalize = check_flag(module, "normalize", normalize)
        self.group = group
        self.logit_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(self.init_logit_scale))

    def __copy__(self) -> Any:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__dict__.update((k, v if k == "group" else copy.deepcopy(v, memo)) for k, v in self.__dict__.items())
        return made

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.group is not None:
            if not (dist.is_available() and dist.is_initialized() and self.group is dist.group.WORLD):
                expected = "None or the default group where the module is pickled"
                raise checks.value_error(type(self).__name__, "group", expected, "another one; save its state_dict()")
            state["group"] = _DEFAULT_GROUP
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["group"] == _DEFAULT_GROUP:
            if not (dist.is_available() and dist.is_initialized()):
                expected = "a default group, as the pickled module has, to be initialized before"
                raise RuntimeError(f"{type(self).__name__}: group: expected {expected}; got none")
            state = {**state, "group": dist.group.WORLD}
        super().__setstate__(state)

    def _sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (F.normalize(x, dim=-1), F.normalize(y, dim=-1)) if self.normalize else (x, y)


class ContrastiveLoss(_PairLoss):
    """The symmetric loss of CLIP with its learned scale: `contrastive_loss`.

    ``logit_scale`` is a parameter and the logarithm of the scale, as CLIP keeps it; what is used is never above
    ``max_logit_scale``, and there its gradient is 0.

    Args:
        init_logit_scale: the scale to begin with, > 0.
        max_logit_scale: its bound, > 0.
        label_smoothing: see the op.
        normalize: whether embeddings are divided by their norms first; else they are used as they are.
        group: a process group over which the batch is spread, see the op. Copies share it; of a pickle the default
            group alone can be a part, and is that of the program which loads it.

    Example:
        >>> criterion = ContrastiveLoss(normalize=True)
        >>> criterion(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        init_logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        label_smoothing: float = 0.0,
        normalize: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("ContrastiveLoss", init_logit_scale, normalize, group, device, dtype)
        self.max_logit_scale = _positive("ContrastiveLoss", "max_logit_scale", max_logit_scale)
        self.label_smoothing = checks.check_number("ContrastiveLoss", "label_smoothing", label_smoothing)
        if not 0.0 <= self.label_smoothing <= 1.0:
            expected = "a number in 0 … 1"
            raise checks.value_error("ContrastiveLoss", "label_smoothing", expected, self.label_smoothing)
        self.reset_parameters()

    @leaf_of_traces
    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            x: (N, D) embeddings.
            y: (N, D); x[i] and y[i] are a pair.
            labels: (N,) integers; pairs of one label are positives of each other.

        Raises:
            ValueError, TypeError, RuntimeError: as `contrastive_loss`.
        """
        x, y = self._sides(x, y)
        scale = self.logit_scale.clamp(max=math.log(self.max_logit_scale))
        options: dict[str, Any] = dict(labels=labels, label_smoothing=self.label_smoothing, group=self.group)
        return contrastive_loss(x, y, scale, is_log_scale=True, **options)

    def extra_repr(self) -> str:
        smoothing = f", label_smoothing={self.label_smoothing:g}" if self.label_smoothing else ""
        return f"max_logit_scale={self.max_logit_scale:g}{smoothing}, normalize={self.normalize}"


class SigmoidContrastiveLoss(_PairLoss):
    """The pairwise loss of SigLIP with its learned scale and bias: `sigmoid_contrastive_loss`.

    ``logit_scale`` is a parameter and the logarithm of the scale, ``logit_bias`` one and the bias itself.

    Args:
        init_logit_scale: the scale to begin with, > 0.
        init_logit_bias: the bias to begin with.
        normalize: whether embeddings are divided by their norms first; else they are used as they are.
        group: a process group over which the batch is spread, see the op. Copies share it; of a pickle the default
            group alone can be a part, and is that of the program which loads it.

    Example:
        >>> criterion = SigmoidContrastiveLoss(normalize=True)
        >>> criterion(torch.randn(8, 64), torch.randn(8, 64)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        init_logit_scale: float = 10.0,
        init_logit_bias: float = -10.0,
        normalize: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__("SigmoidContrastiveLoss", init_logit_scale, normalize, group, device, dtype)
        self.init_logit_bias = checks.check_number("SigmoidContrastiveLoss", "init_logit_bias", init_logit_bias)
        self.logit_bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.logit_bias, self.init_logit_bias)

    @leaf_of_traces
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            x: (N, D) embeddings.
            y: (N, D); x[i] and y[i] are a pair.

        Raises:
            ValueError, TypeError, RuntimeError: as `sigmoid_contrastive_loss`.
        """
        x, y = self._sides(x, y)
        return sigmoid_contrastive_loss(x, y, self.logit_scale, self.logit_bias, is_log_scale=True, group=self.group)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"
