"""merge_embeddings in plain PyTorch: the specification every kernel is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._checks import eager_values_readable


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


def example_inputs(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, object]:
    """One small call: two texts with places for the patches of three images, two of them in the first."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    mask = torch.zeros(2, 40, dtype=torch.bool, device=device)
    mask[0, 2:20] = mask[1, 5:14] = True
    return {"text": random(2, 40, 64), "modal": [random(9, 64) for _ in range(3)], "mask": mask}
