"""deformable_attention in plain PyTorch: the specification every kernel is tested against.

    out[b, q, h] = Σ_l Σ_p a[b, q, h, l, p] · sample(value_l[b, :, h], locations[b, q, h, l, p])

Runs on every device and dtype, differentiable any number of times. Positions, samples and sums are float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples


def deformable_attention(
    values: Sequence[Tensor],  # [B, S_i, H, D] each: the maps of its levels, row by row, one after another
    locations: Tensor,  # [B, Lq, H, K, 2] as (x, y) in 0 … 1, K the points of all levels, of all sources
    weights: Tensor,  # [B, Lq, H, K]
    presence: Tensor | None,  # [sources] or [B, sources] bool
    shapes: Sequence[int],  # height and width of every level
    levels: Sequence[int],  # how many of them each source has
    points: Sequence[int],  # of each level
    discrete: bool,
) -> Tensor:
    """Output [B, Lq, H · D]."""
    batch, queries, heads, _ = weights.shape
    width = values[0].shape[3]
    wide = torch.promote_types(values[0].dtype, torch.float32)
    out = torch.zeros((batch, heads, queries, width), dtype=wide, device=weights.device)
    level = point = 0
    for source, value in enumerate(values):
        present = None if presence is None else presence[..., source].reshape(-1, 1, 1, 1)  # [B or 1, 1, 1, 1]
        row = 0
        for _ in range(levels[source]):
            height, columns, count = shapes[2 * level], shapes[2 * level + 1], points[level]
            if height * columns > 0 and count > 0:
                maps = value[:, row : row + height * columns].transpose(1, 2).to(wide)  # [B, H, height · columns, D]
                place = locations[..., point : point + count, :].transpose(1, 2)  # [B, H, Lq, P, 2]
                weight = weights[..., point : point + count].transpose(1, 2).to(wide)  # [B, H, Lq, P]
                sampled = _nearest if discrete else _bilinear
                out = out + sampled(maps, place, weight, present, height, columns)
            row += height * columns
            point += count
            level += 1
    return out.to(values[0].dtype).transpose(1, 2).reshape(batch, queries, heads * width)


def _bilinear(maps: Tensor, place: Tensor, weight: Tensor, present: Tensor | None, height: int, columns: int) -> Tensor:
    """As grid_sample with align_corners=False: pixel centres at (i + ½) / size, zeros beyond the map."""
    place = place.to(torch.promote_types(place.dtype, torch.float32))
    x, y = place[..., 0] * columns - 0.5, place[..., 1] * height - 0.5
    reaches = (x >= -1) & (x < columns) & (y >= -1) & (y < height)  # not where either is NaN
    if present is not None:
        reaches = reaches & present
    x, y, weight = (torch.where(reaches, t, torch.zeros_like(t)) for t in (x, y, weight))
    left, top = x.floor(), y.floor()
    of_column, of_row = x - left, y - top
    out = torch.zeros((), dtype=maps.dtype, device=maps.device)
    for down, row_share in enumerate((1 - of_row, of_row)):
        for right, column_share in enumerate((1 - of_column, of_column)):
            column, row = left.long() + right, top.long() + down
            valid = reaches & (column >= 0) & (column < columns) & (row >= 0) & (row < height)
            share = (row_share * column_share).to(maps.dtype) * weight
            out = out + _weighted_rows(maps, row * columns + column, share, valid)
    return out


def _nearest(maps: Tensor, place: Tensor, weight: Tensor, present: Tensor | None, height: int, columns: int) -> Tensor:
    """As RT-DETRv2: the pixel ⌊location · size + ½⌋, clamped to the map. Locations get no gradient but zeros."""
    valid = place.isfinite().all(-1)
    if present is not None:
        valid = valid & present
    place = place.detach().to(torch.promote_types(place.dtype, torch.float32))
    place = torch.where(valid.unsqueeze(-1), place, torch.zeros_like(place))
    column = (place[..., 0] * columns + 0.5).floor().clamp(0, columns - 1).long()
    row = (place[..., 1] * height + 0.5).floor().clamp(0, height - 1).long()
    return _weighted_rows(maps, row * columns + column, torch.where(valid, weight, torch.zeros_like(weight)), valid)


def _weighted_rows(maps: Tensor, index: Tensor, share: Tensor, valid: Tensor) -> Tensor:
    """Σ_p share · maps[index], [B, H, Lq, D]; what is not valid is not read."""
    index = torch.where(valid, index, torch.zeros_like(index))
    flat = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, maps.shape[3])  # [B, H, Lq · P, D]
    rows = maps.gather(2, flat).unflatten(2, index.shape[2:])
    rows = torch.where(valid.unsqueeze(-1), rows, torch.zeros_like(rows))
    return (share.unsqueeze(-1) * rows).sum(-2)


def example_inputs(draw: Draw, B: int = 2, H: int = 2, L: int = 3, D: int = 4) -> Examples:
    return {
        "a list": {
            "value": [draw(B, 2 * L, H, D), draw(B, 4, H, D)],
            "spatial_shapes": ((2, L), (2, 2)),
            "sampling_locations": draw.uniform(B, L, H, 2, 2, 2),
            "attention_weights": draw(B, L, H, 2, 2),
            "presence": draw.flags(B, 2),
        },
        "one value": {
            "value": draw(B, 2 * L + 2, H, D),
            "spatial_shapes": ((2, L), (1, 2)),
            "sampling_locations": draw.uniform(B, L, H, 2, 2, 2) * 1.3 - 0.15,  # some beyond the edges
            "attention_weights": draw(B, L, H, 2, 2),
        },
    }
