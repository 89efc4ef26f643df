"""The weighted sum of each modality's cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door, needs_grad
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops import _linear_loss as linear_loss
from mmkernels.ops._contrastive import PLAIN
from mmkernels.ops._labels import check_ignore_index, check_labels
from mmkernels.ops.multimodal_cross_entropy.linear import linear_op
from mmkernels.ops.multimodal_cross_entropy.op import multimodal_cross_entropy_op
from mmkernels.ops.multimodal_cross_entropy.reference import combined, valid_rows

__all__ = ["multimodal_cross_entropy"]

_NAME = "multimodal_cross_entropy"
_LEAST_Q = 1e-30  # below it is the cross-entropy to the last bit, and q itself no float32


def multimodal_cross_entropy(
    logits: Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    weights: Tensor | None = None,
    log_vars: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    presence: Tensor | None = None,
    robust: Literal["gce", "symmetric"] | None = None,
    q: float = 0.7,
    modulation: Tensor | None = None,
    linear: Sequence[tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss for each modality's own prediction, and their sum; the backward makes the gradient in one pass.

        CE_i = mean over valid rows of −log p_i[y],   total = Σ w_i CE_i   or   Σ e^(−s_i) CE_i + s_i

    The second with ``log_vars``: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", 2018
    (arXiv:1705.07115). Nothing as large as the logits is kept or written beside their gradient.

    Args:
        logits: a list of M ≥ 1 tensors (B, C_i), float32, bfloat16, float16, or float64 (reference backend alone). Any
            strides; a last dim that is not contiguous costs a copy. A class whose logit is −inf has probability 0 and
            gradient 0.
        labels: (B,) of an integer dtype, or a list of M such. Out of range they raise where their values can be read,
            on the CPU.
        weights: w, (M,) of the logits' dtype or float32; default: ones.
        log_vars: s, (M,) of the logits' dtype or float32; not together with ``weights``.
        label_smoothing: as in `torch.nn.functional.cross_entropy`: the share of the target that all C_i classes
            divide. Not together with ``robust``.
        ignore_index: rows with this label are not valid.
        presence: (B, M) or (M,) bool, True where a modality was observed. Where one is absent its row is not valid.
        robust: another loss in place of CE_i. "gce": (1 − p[y]^q) / q, Zhang & Sabuncu, 2018 (arXiv:1805.07836).
            "symmetric": CE plus the reverse cross-entropy with log 0 := −4, that is −log p[y] + 4 (1 − p[y]), Wang et
            al., 2019 (arXiv:1908.06112).
        q: of "gce", 0 < q ≤ 1.
        modulation: (M,) of the logits' dtype or float32: what the gradient that flows to each modality's logits is
            multiplied by; the losses, and the gradients of ``weights`` and ``log_vars``, stay. Its own gradient is 0.

        linear: heads (weight (C_i, D_i), bias (C_i,) or None), one for each modality. In the place of ``logits`` come
            hidden states (B, D_i) then, and the logits hidden_i @ weight_i.T + bias_i are made chunk by chunk, of no
            more than 32 MiB, and never held: for vocabularies of 32 000 classes and more. Gradients of hidden states,
            weights and biases.

    Rows that are not valid are never read. A modality without a valid row has loss 0 and contributes nothing to the
    total, no s_i either. Under autocast the losses are float32, as torch's are.

    Returns:
        total () and the losses of the modalities (M,), both differentiable, in the logits' dtype.

    Example:
        >>> image, text = torch.randn(8, 10), torch.randn(8, 10)
        >>> total, each = multimodal_cross_entropy([image, text], torch.arange(8), weights=torch.tensor([0.7, 0.3]))
        >>> total.shape, each.shape
        (torch.Size([]), torch.Size([2]))
    """
    vectors = (weights, log_vars, presence, modulation)
    listed = isinstance(labels, (list, tuple))
    targets: Sequence[Any] = labels if isinstance(labels, (list, tuple)) else [labels]
    if may_use_door() and isinstance(logits, (list, tuple)) and len(targets) == (len(logits) if listed else 1):
        made = logits if linear is None else _small_logits(logits, linear, targets, ignore_index, presence)
        out = made and multimodal_cross_entropy_op.unchecked(
            made, targets, *vectors, label_smoothing, ignore_index, robust, q, False
        )
        if out:
            return out[0], out[1]
    if is_overridden(logits, labels, *vectors, linear):
        return overridden_call(multimodal_cross_entropy, locals())
    first = fusion.first_source(_NAME, logits, "logits")
    heads = None if linear is None else linear_loss.heads_in(_NAME, linear, len(logits), "each modality")
    if wide := checks.autocast_is_on(first.device):
        if heads is None:
            logits = checks.autocast_promoted(*logits)
        else:
            logits, heads = fusion.autocast(first.device, logits, heads)
        first = logits[0]
    logits = list(logits)
    _check_logits(logits)
    classes = [z.shape[1] for z in logits]
    if heads is not None:
        classes = linear_loss.check_heads(_NAME, heads, logits, "logits[0]")
    _check_vectors(first, len(logits), weights=weights, log_vars=log_vars, modulation=modulation)
    ignore_index = check_ignore_index(_NAME, ignore_index)
    targets = _check_labels(labels, first, len(logits), ignore_index)
    if presence is not None:
        fusion.check_presence(_NAME, presence, first.shape[:1], len(logits), first, "logits[0]")
    if weights is not None and log_vars is not None:
        raise checks.value_error(_NAME, "log_vars", "None where weights are given", "both")
    label_smoothing, q = check_options(_NAME, label_smoothing, robust, q)
    _check_range(targets, classes, ignore_index, presence)
    if heads is not None:
        losses, counts = [], []
        for i, (x, (weight, bias)) in enumerate(zip(logits, heads, strict=True)):
            y = targets[i if len(targets) > 1 else 0]
            valid = valid_rows(y, ignore_index, presence, i)
            scale = None if modulation is None else modulation[i]
            wanted = [needs_grad(t) for t in (x, weight, bias)]
            losses.append(linear_op(x, weight, bias, y, valid, scale, label_smoothing, robust, q, wanted)[0])
            counts.append(valid.sum())
        total, means = combined(losses, counts, weights, log_vars)
        return (total, means) if wide else (total.to(first.dtype), means.to(first.dtype))
    out = multimodal_cross_entropy_op(logits, targets, *vectors, label_smoothing, ignore_index, robust, q, wide)
    return out[0], out[1]


def _small_logits(
    hidden: Sequence[Any], linear: Any, labels: Sequence[Any], ignore_index: Any, presence: Any
) -> list[Tensor] | None:
    """See `linear_loss.small_logits`."""
    if type(ignore_index) is not int or not all(type(y) in PLAIN and y.dtype is torch.int64 for y in labels):
        return None
    if not all(type(x) in PLAIN and x.shape[:1] == y.shape for x in hidden for y in labels):
        return None
    if presence is not None:
        shapes = (len(hidden),), (*labels[0].shape, len(hidden))
        if type(presence) not in PLAIN or presence.dtype is not torch.bool or presence.shape not in shapes:
            return None

    def valid(i: int) -> Tensor:
        return valid_rows(labels[i if len(labels) > 1 else 0], ignore_index, presence, i)

    return linear_loss.small_logits(hidden, linear, valid)


def _check_logits(logits: Sequence[Tensor]) -> None:
    first = logits[0]
    if first.dtype not in checks.FLOATING:
        expected = "dtype float32, bfloat16, float16 or float64"
        raise checks.type_error(_NAME, "logits[0]", expected, first.dtype)
    for i, z in enumerate(logits):
        checks.check_tensor(_NAME, f"logits[{i}]", z)
        checks.check_same_kind(_NAME, first, "logits[0]", **{f"logits[{i}]": z})
        if z.dim() != 2:
            raise checks.value_error(_NAME, f"logits[{i}]", "shape (B, C)", tuple(z.shape))
        if z.shape[0] != first.shape[0]:
            expected = f"{first.shape[0]} rows, as many as logits[0]"
            raise checks.value_error(_NAME, f"logits[{i}]", expected, f"shape {tuple(z.shape)}")


def _check_vectors(first: Tensor, count: int, **vectors: Tensor | None) -> None:
    """Numbers of the modalities, in the logits' dtype or float32."""
    for name, value in vectors.items():
        if value is None:
            continue
        checks.check_tensor(_NAME, name, value)
        if value.dtype not in (first.dtype, torch.float32):
            expected = f"the dtype of logits[0], {first.dtype}, or torch.float32"
            raise checks.type_error(_NAME, name, expected, value.dtype)
        checks.check_same_device(_NAME, name, value, "logits[0]", first.device)
        if not fusion.has_shape(value, (count,)):
            raise checks.value_error(_NAME, name, f"shape {(count,)}, a number for each modality", tuple(value.shape))


def _check_labels(labels: Tensor | Sequence[Tensor], first: Tensor, count: int, ignore_index: int) -> list[Tensor]:
    """The labels as int64, in a list of one for all modalities, or of one for each."""
    listed = isinstance(labels, (list, tuple))
    given: Sequence[Any] = labels if isinstance(labels, (list, tuple)) else [labels]
    if listed and len(given) != count:
        raise checks.value_error(_NAME, "labels", f"a tensor, or a list of {count}, one for each modality", len(given))
    return [
        check_labels(
            _NAME, f"labels[{i}]" if listed else "labels", y, first.shape[:1], first, "logits[0]", ignore_index
        )
        for i, y in enumerate(given)
    ]


def check_options(op: str, label_smoothing: Any, robust: Any, q: Any) -> tuple[float, float]:
    """Smoothing and q as floats."""
    label_smoothing = checks.check_number(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise checks.value_error(op, "label_smoothing", "a number from 0 to 1", label_smoothing)
    q = checks.check_number(op, "q", q)
    if not 0 < q <= 1:
        raise checks.value_error(op, "q", "a number above 0, at most 1", q)
    if robust is not None and not isinstance(robust, str):
        raise checks.type_error(op, "robust", "None, 'gce' or 'symmetric'", type(robust).__name__)
    if robust not in (None, "gce", "symmetric"):
        raise checks.value_error(op, "robust", "None, 'gce' or 'symmetric'", repr(robust))
    if robust is not None and label_smoothing != 0:
        raise checks.value_error(op, "label_smoothing", f"0.0 with robust={robust!r}", label_smoothing)
    return label_smoothing, max(q, _LEAST_Q)


def _check_range(labels: list[Tensor], classes: list[int], ignore_index: int, presence: Tensor | None) -> None:
    """Labels of valid rows are below the number of classes, where values can be read."""
    tensors = labels if presence is None else [*labels, presence]
    if not checks.eager_values_readable(*tensors):
        return
    for i, count in enumerate(classes):
        y = labels[i if len(labels) > 1 else 0]
        wrong = ((y < 0) | (y >= count)) & valid_rows(y, ignore_index, presence, i)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            name = f"labels[{i}]" if len(labels) > 1 else "labels"
            expected = f"labels from 0 to {count - 1}, or ignore_index {ignore_index}"
            raise checks.value_error(_NAME, name, expected, f"{int(y[row])} in row {row}")
