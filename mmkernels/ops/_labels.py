"""What the losses that take labels ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion


def check_ignore_index(op: str, ignore_index: Any) -> int:
    ignore_index = checks.check_index(op, "ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise checks.value_error(op, "ignore_index", "an int in the range of int64", ignore_index)
    return ignore_index


def check_labels(
    op: str,
    argument: str,
    labels: Tensor,
    shape: Sequence[int],
    first: Tensor,
    first_name: str,
    ignore_index: int | None = None,
) -> Tensor:
    """Labels of any integer dtype as int64, in which a number that their own dtype lacks equals none of them.

    With ``ignore_index`` what int64 lacks is no label and not ignored; without, different labels stay different.
    """
    checks.check_tensor(op, argument, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise checks.type_error(op, argument, "an integer dtype", labels.dtype)
    checks.check_same_device(op, argument, labels, first_name, first.device)
    if not fusion.has_shape(labels, shape):
        raise checks.value_error(op, argument, f"shape {tuple(shape)}", tuple(labels.shape))
    wide = labels.to(torch.int64)
    if labels.dtype != torch.uint64 or ignore_index is None:
        return wide
    return wide.masked_fill(wide < 0, -2 if ignore_index == -1 else -1)
