"""Late fusion: one decision from the logits of several classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.decision_fusion.op import decision_fusion_op

__all__ = ["decision_fusion"]

Method = Literal["mean", "log", "product", "max", "vote"]
METHODS = ("mean", "log", "product", "max", "vote")

_NAME = "decision_fusion"


def decision_fusion(
    logits: Sequence[Tensor],
    weights: Tensor | None = None,
    *,
    method: Method = "mean",
    presence: Tensor | None = None,
) -> Tensor:
    """The decision of several classifiers, one for each modality, from p_i = softmax(logits_i).

        mean     Σ_i w_i p_i
        log      softmax(Σ_i w_i log p_i), a weighted geometric mean
        product  softmax(Σ_i log p_i)
        max      max_i p_i, class by class, divided by its sum
        vote     Σ_i w_i [c = argmax p_i] / Σ_i w_i

    Kittler et al., "On Combining Classifiers", 1998 (doi:10.1109/34.667881).

    Args:
        logits: M ≥ 1 tensors (B, C), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a
            last dim that is not contiguous costs a copy of that tensor.
        weights: w, (M,) or (B, M), of the logits' dtype; None = all alike, summing to 1. Used as they are, but in a row
            that lacks a modality, where those of the others are divided by their sum. "product" and "max" have none.
        method: which of the formulas. The first class wins an argmax that several share.
        presence: (B, M) or (M,) bool, True where a modality was observed. An absent one is not read, nor is its weight
            in that row; both get gradient 0.

    A class whose logit is −inf has probability 0 and gradient 0; logits that are all −inf count as absent. Under
    autocast logits and weights are cast to its dtype.

    Returns:
        Probabilities (B, C), made in float32; zeros where every modality is absent, or where "log" or "product" leave
        no class. Differentiable in logits and weights, but for "vote".

    Example:
        >>> text, audio = torch.randn(8, 10), torch.randn(8, 10)
        >>> decision_fusion([text, audio], torch.tensor([0.7, 0.3]), method="log").shape
        torch.Size([8, 10])
    """
    if method != "vote" and may_use_door():
        out = decision_fusion_op.unchecked(logits, weights, method, presence)
        if out is not None:
            return out
    if is_overridden(logits, weights, presence):
        return overridden_call(decision_fusion, locals())
    first = fusion.first_source(_NAME, logits, "logits")
    if checks.autocast_is_on(first.device):
        logits, weights = fusion.autocast(first.device, logits, weights)
        first = logits[0]
    _check(first, logits, weights, presence)
    check_method(_NAME, method)
    sources = list(logits)
    if method == "vote":
        sources, weights = [x.detach() for x in sources], None if weights is None else weights.detach()
    return decision_fusion_op(sources, weights, method, presence)[0]


def check_method(op: str, method: Any) -> None:
    if method in METHODS:
        return
    expected = f"one of {', '.join(METHODS)}"
    if not isinstance(method, str):
        raise checks.type_error(op, "method", expected, type(method).__name__)
    raise checks.value_error(op, "method", expected, repr(method))


def _check(first: Tensor, logits: Sequence[Tensor], weights: Tensor | None, presence: Tensor | None) -> None:
    if first.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "logits[0]", "dtype float32, bfloat16, float16 or float64", first.dtype)
    if first.dim() != 2:
        raise checks.value_error(_NAME, "logits[0]", "shape (B, C)", tuple(first.shape))
    for i, x in enumerate(logits):
        fusion.check_shaped(_NAME, f"logits[{i}]", x, tuple(first.shape), first, "logits[0]")
    count, lead = len(logits), first.shape[:1]
    if weights is not None:
        checks.check_tensor(_NAME, "weights", weights)
        fusion.check_kind(_NAME, "weights", weights, first, "logits[0]")
        if not fusion.has_shape(weights, (count,)) and not fusion.has_shape(weights, (*lead, count)):
            expected = f"shape {(count,)} or {(*lead, count)}"
            raise checks.value_error(_NAME, "weights", expected, tuple(weights.shape))
    if presence is not None:
        fusion.check_presence(_NAME, presence, lead, count, first, "logits[0]")
