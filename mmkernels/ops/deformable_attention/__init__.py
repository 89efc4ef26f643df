"""Attention over few places of a pyramid of feature maps, each sampled where the query says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.deformable_attention.op import deformable_attention_op

__all__ = ["deformable_attention"]

_NAME = "deformable_attention"


def deformable_attention(
    value: Tensor | Sequence[Tensor],
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points: Sequence[int] | None = None,
    method: Literal["bilinear", "discrete"] = "bilinear",
    presence: Tensor | None = None,
) -> Tensor:
    """Multi-scale deformable attention: every query and head sums few samples of each level's map.

        out[b, q, h] = Σ_l Σ_p a[b, q, h, l, p] · sample(value_l[b, :, h], location[b, q, h, l, p])

    `Deformable DETR <https://arxiv.org/abs/2010.04159>`_, and after it Grounding DINO, Mask2Former, RT-DETR, BEVFormer.

    Args:
        value: (B, S, H, D), float32, bfloat16, float16, or float64 (reference backend alone): the maps of the levels,
            row by row, one after another, S = Σ height · width. Or a list of such, one per source (cameras, radar,
            lidar), whose levels follow each other. Any strides; a last dim that is not contiguous costs a copy.
        spatial_shapes: L pairs (height, width), of the levels of all sources; a list, or an (L, 2) integer tensor on
            the CPU.
        sampling_locations: (B, Lq, H, L, P, 2) as (x, y) in 0 … 1 of a map's width and height; with ``points``
            (B, Lq, H, ΣP_l, 2). Of value's dtype or float32. What is not finite samples nothing and gets gradient 0.
        attention_weights: (B, Lq, H, L, P), with ``points`` (B, Lq, H, ΣP_l), of value's dtype. Used as they are.
        points: how many points P_l each level has, where they differ.
        method: "bilinear", as grid_sample with align_corners=False: pixel centres at (i + ½) / size, zeros beyond the
            map. Or "discrete", as RT-DETRv2: the pixel ⌊location · size + ½⌋, clamped to the map; locations get
            gradient 0.
        presence: (sources,) or (B, sources) bool. An absent source is not read, contributes nothing, gets gradient 0.

    Under autocast value and attention_weights are cast to its dtype, and sampling_locations keep theirs.

    Returns:
        (B, Lq, H · D), contiguous.

    Example:
        >>> value = torch.randn(1, 8 * 8 + 4 * 4, 2, 16)  # two levels, two heads
        >>> locations, weights = torch.rand(1, 5, 2, 2, 4, 2), torch.rand(1, 5, 2, 2, 4)
        >>> deformable_attention(value, [(8, 8), (4, 4)], locations, weights).shape
        torch.Size([1, 5, 32])
    """
    if is_overridden(value, spatial_shapes, sampling_locations, attention_weights, presence):
        return overridden_call(deformable_attention, locals())
    listed = isinstance(value, (list, tuple))
    values: list[Tensor] = list(value) if listed else [value]  # type: ignore[arg-type,list-item]
    if not values:
        raise checks.value_error(_NAME, "value", "a tensor or at least one in a list", "an empty list")
    for i, one in enumerate(values):
        checks.check_tensor(_NAME, f"value[{i}]" if listed else "value", one)
    checks.check_tensor(_NAME, "sampling_locations", sampling_locations)
    checks.check_tensor(_NAME, "attention_weights", attention_weights)
    if checks.autocast_is_on(values[0].device):
        *values, attention_weights = checks.autocast_inputs(values[0].device, *values, attention_weights)
        if sampling_locations.dtype not in (values[0].dtype, torch.float32) and sampling_locations.is_floating_point():
            sampling_locations = sampling_locations.to(values[0].dtype)
    _check_values(values, listed)
    first, name = values[0], "value[0]" if listed else "value"
    shapes = _level_shapes(spatial_shapes)
    levels = _levels_of_sources(shapes, values, listed)
    counts = _check_samples(first, name, len(shapes), sampling_locations, attention_weights, points)
    if method not in ("bilinear", "discrete"):
        expected = "'bilinear' or 'discrete'"
        if not isinstance(method, str):
            raise checks.type_error(_NAME, "method", expected, type(method).__name__)
        raise checks.value_error(_NAME, "method", expected, repr(method))
    if presence is not None:
        fusion.check_presence(_NAME, presence, first.shape[:1], len(values), first, name)
    if points is None:
        sampling_locations, attention_weights = sampling_locations.flatten(3, 4), attention_weights.flatten(3)
    flat = [size for shape in shapes for size in shape]
    discrete = method == "discrete"
    return deformable_attention_op(
        values, sampling_locations, attention_weights, presence, flat, levels, counts, discrete
    )[0]


def _check_values(values: list[Tensor], listed: bool) -> None:
    first = values[0]
    if first.dtype not in checks.FLOATING:
        expected = "dtype float32, bfloat16, float16 or float64"
        raise checks.type_error(_NAME, "value[0]" if listed else "value", expected, first.dtype)
    for i, value in enumerate(values):
        name = f"value[{i}]" if listed else "value"
        if value.dim() != 4:
            raise checks.value_error(_NAME, name, "4 dims (B, S, H, D)", f"shape {tuple(value.shape)}")
        checks.check_same_kind(_NAME, first, "value[0]", **{name: value})
        if value.shape[0] != first.shape[0] or value.shape[2:] != first.shape[2:]:
            expected = f"shape {fusion.shape_text((first.shape[0], 'S', *first.shape[2:]))}"
            raise checks.value_error(_NAME, name, expected, tuple(value.shape))


def _is_size(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _level_shapes(spatial_shapes: Any) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.is_floating_point() or spatial_shapes.is_complex() or spatial_shapes.dtype == torch.bool:
            raise checks.type_error(_NAME, "spatial_shapes", "an integer dtype", spatial_shapes.dtype)
        if spatial_shapes.device.type != "cpu":
            got = f"{spatial_shapes.device}"
            raise RuntimeError(f"{_NAME}: spatial_shapes: expected a list or a tensor on the CPU; got one on {got}")
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise checks.value_error(_NAME, "spatial_shapes", "shape (L, 2)", tuple(spatial_shapes.shape))
        spatial_shapes = spatial_shapes.tolist()
    elif not isinstance(spatial_shapes, (list, tuple)):
        got = type(spatial_shapes).__name__
        raise checks.type_error(_NAME, "spatial_shapes", "a list of pairs (height, width) or a tensor", got)
    for i, shape in enumerate(spatial_shapes):
        name = f"spatial_shapes[{i}]"
        if not isinstance(shape, (list, tuple)) or not all(_is_size(n) for n in shape):
            raise checks.type_error(_NAME, name, "a pair of integers (height, width)", repr(shape))
        if len(shape) != 2 or shape[0] < 0 or shape[1] < 0:
            raise checks.value_error(_NAME, name, "a pair of sizes (height, width), 0 or more", tuple(shape))
    return [(height, width) for height, width in spatial_shapes]


def _levels_of_sources(shapes: list[tuple[int, int]], values: list[Tensor], listed: bool) -> list[int]:
    """How many levels each source has: as many as fill its rows, empty ones behind it counted to it."""
    levels, at = [], 0
    for i, value in enumerate(values):
        begin, rows = at, 0
        last = i == len(values) - 1
        while at < len(shapes) and (last or rows < value.shape[1] or shapes[at][0] * shapes[at][1] == 0):
            rows += shapes[at][0] * shapes[at][1]
            at += 1
        if rows != value.shape[1]:
            name = f"value[{i}]" if listed else "value"
            expected = f"{rows} rows, the pixels of spatial_shapes {shapes[begin:at]}"
            raise checks.value_error(_NAME, name, expected, f"{value.shape[1]} in shape {tuple(value.shape)}")
        levels.append(at - begin)
    return levels


def _check_samples(
    value: Tensor, name: str, levels: int, locations: Tensor, weights: Tensor, points: Sequence[int] | None
) -> list[int]:
    """The number of points of each level."""
    if locations.dtype not in (value.dtype, torch.float32):
        expected = f"the dtype of {name}, {value.dtype}, or torch.float32"
        raise checks.type_error(_NAME, "sampling_locations", expected, locations.dtype)
    checks.check_same_device(_NAME, "sampling_locations", locations, name, value.device)
    checks.check_same_kind(_NAME, value, name, attention_weights=weights)
    batch, heads = value.shape[0], value.shape[2]
    if points is None:
        wanted: tuple[int | str, ...] = (batch, "Lq", heads, levels, "P", 2)
        fits = locations.dim() == 6 and locations.shape[3] == levels
    else:
        if not isinstance(points, (list, tuple)) or not all(_is_size(n) for n in points):
            raise checks.type_error(_NAME, "points", "a list of integers", repr(points))
        if len(points) != levels or any(n < 0 for n in points):
            raise checks.value_error(_NAME, "points", f"{levels} counts, one for each level", repr(points))
        wanted = (batch, "Lq", heads, sum(points), 2)
        fits = locations.dim() == 5 and locations.shape[3] == sum(points)
    if not fits or locations.shape[0] != batch or locations.shape[2] != heads or locations.shape[-1] != 2:
        raise checks.value_error(
            _NAME, "sampling_locations", f"shape {fusion.shape_text(wanted)}", tuple(locations.shape)
        )
    if weights.shape != locations.shape[:-1]:
        raise checks.value_error(
            _NAME, "attention_weights", f"shape {tuple(locations.shape[:-1])}", tuple(weights.shape)
        )
    return [locations.shape[4]] * levels if points is None else list(points)
