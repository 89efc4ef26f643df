"""What the losses that take labels ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion


def check_labels(
    op: str, argument: str, labels: Tensor, shape: Sequence[int], first: Tensor, first_name: str
) -> Tensor:
    """Labels of any integer dtype as int64, in which a number that their own dtype lacks equals none of them."""
    checks.check_tensor(op, argument, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise checks.type_error(op, argument, "an integer dtype", labels.dtype)
    checks.check_same_device(op, argument, labels, first_name, first.device)
    if not fusion.has_shape(labels, shape):
        raise checks.value_error(op, argument, f"shape {tuple(shape)}", tuple(labels.shape))
    return labels.to(torch.int64)
