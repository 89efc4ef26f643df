"""merge_embeddings in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._checks import eager_values_readable
from mmkernels.ops._examples import Draw, Examples


def merge_embeddings(
    text: Tensor,  # [B, L, C]
    modals: Sequence[Tensor],  # [T_i, C] each
    mask: Tensor,  # [B, L] bool
    check: bool,
) -> Tensor:
    """text with its t-th True position replaced by row t of all modals: masked_scatter, forward and backward without
    a shape that depends on data."""
    rows = torch.cat(list(modals))
    if check:
        check_count(rows.shape[0], mask)
    if rows.shape[0] == 0 or text.numel() == 0:
        return text.clone()
    row = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)  # the row that would go to each position
    return torch.where(mask.unsqueeze(-1), rows[row], text)


def check_count(rows: int, mask: Tensor) -> None:
    """Raises on the CPU; elsewhere an assertion on the device, so that nothing waits for it."""
    count = mask.sum()
    if mask.device.type != "cpu":
        torch._assert_async(count == rows, "merge_embeddings: mask: as many True positions as modal has rows")
    elif eager_values_readable(mask) and int(count) != rows:  # a second derivative was checked by its forward
        raise ValueError(
            f"merge_embeddings: mask: expected {rows} True positions, one for each row of modal; got {int(count)}"
        )


def example_inputs(draw: Draw, B: int = 3, L: int = 4, C: int = 6) -> Examples:
    rows = B * min(L, 2)
    mask = (torch.arange(L) < 2).expand(B, L).clone()
    return {
        "a list": {"text": draw(B, L, C), "modal": [draw(rows // 3, C), draw(rows - rows // 3, C)], "mask": mask},
        "one": {"text": draw(B, L, C), "modal": draw(rows, C), "mask": mask},
    }
