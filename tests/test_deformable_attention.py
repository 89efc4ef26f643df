"""deformable_attention on every backend and instruction set: output and all gradients against the float64 reference."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import op_contract as contract
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from environment import DEVICE, HERE
from fusion_cases import each_dtype, few_dtypes
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits

Shapes = Sequence[tuple[int, int]]


def make(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    queries: int = 7,
    heads: int = 3,
    width: int = 20,
    shapes: Shapes = ((5, 7), (1, 1), (3, 4)),
    points: int = 4,
    reach: float = 0.2,
) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """A call's arguments; a share of the locations lies up to ``reach`` beyond the maps."""
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width).to(dtype).requires_grad_()
    size = (batch, queries, heads, len(shapes), points)
    locations = (torch.rand(*size, 2) * (1 + 2 * reach) - reach).to(dtype).requires_grad_()
    weights = torch.rand(*size).flatten(3).softmax(-1).view(size) if math.prod(size) else torch.rand(size)
    return value, shapes, locations, weights.to(dtype).requires_grad_()


def by_grid_sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As Deformable DETR and the models of transformers have it in plain torch."""
    batch, _, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    grids = 2 * locations - 1
    sampled = []
    for level, part in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, width, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * shares).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2)


def by_nearest(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As RT-DETRv2 samples by its discrete method."""
    batch, _, heads, width = value.shape
    out = torch.zeros(batch, locations.shape[1], heads, width, dtype=value.dtype)
    start = 0
    for level, (height, columns) in enumerate(shapes):
        place = (locations[:, :, :, level] * torch.tensor([columns, height]) + 0.5).to(torch.int64)  # [B, Lq, H, P, 2]
        row = place[..., 1].clamp(0, height - 1) * columns + place[..., 0].clamp(0, columns - 1) + start
        index = row.permute(0, 1, 3, 2).flatten(1, 2)[..., None].expand(-1, -1, -1, width)
        rows = value.gather(1, index).view(batch, row.shape[1], row.shape[3], heads, width)
        out = out + (rows * weights[:, :, :, level].transpose(2, 3)[..., None]).sum(2)
        start += height * columns
    return out.flatten(2)


SIZES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "whole vectors": dict(width=32, heads=8, shapes=((8, 8), (4, 4)), batch=1),
    "maps that are read often": dict(width=16, queries=150, shapes=((3, 5),)),
    "large maps that are read seldom": dict(width=32, queries=3, shapes=((40, 40), (9, 11))),
    "one feature": dict(width=1),
    "wider than the registers": dict(width=211, queries=3),
    "eight vectors and more": dict(width=160, queries=2, heads=1),
    "a pixel per level": dict(shapes=((1, 1), (1, 1))),
    "one row, one column": dict(shapes=((1, 9), (9, 1))),
    "one head, many queries": dict(batch=1, heads=1, queries=300, width=16),
    "many points": dict(points=9),
    "one point": dict(points=1, shapes=((4, 4),)),
    "far beyond the maps": dict(reach=3.0),
    "an empty level": dict(shapes=((3, 4), (0, 5), (2, 2))),
    "no levels": dict(shapes=()),
    "no points": dict(points=0),
    "no queries": dict(queries=0),
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no features": dict(width=0),
}


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("size", SIZES)
@each_dtype
def test_output_and_gradients(size: str, method: Any, dtype: torch.dtype, backend: str) -> None:
    value, shapes, locations, weights = make(dtype, **SIZES[size])
    with poisoned_memory():
        (out,) = check_op(mmk.deformable_attention, value, shapes, locations, weights, backend=backend, method=method)
    assert out.shape == (value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    assert out.is_contiguous()


@pytest.mark.parametrize("size", ["odd sizes", "a pixel per level", "one row, one column", "far beyond the maps"])
@pytest.mark.parametrize("method", ["bilinear", "discrete"])
def test_the_reference_is_the_formula_of_the_models(size: str, method: Any) -> None:
    arguments = make(torch.float64, **SIZES[size])
    leaves = [x for x in arguments if isinstance(x, Tensor)]
    out, want = (
        mmk.deformable_attention(*arguments, method=method),
        (by_nearest if method == "discrete" else by_grid_sample)(*arguments),
    )
    torch.testing.assert_close(out, want)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, grad)
    for a, b in zip(got, torch.autograd.grad(want, leaves, grad, allow_unused=True), strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@few_dtypes
def test_a_pixel_centre_gives_the_pixel(dtype: torch.dtype, backend: str) -> None:
    value = torch.arange(1.0, 17.0).to(dtype).view(1, 16, 1, 1)
    places = torch.tensor([[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)]).to(dtype)
    out = mmk.deformable_attention(value, [(4, 4)], places.view(1, 16, 1, 1, 1, 2), value.new_ones(1, 16, 1, 1, 1))
    assert torch.equal(out.flatten(), value.flatten())


@few_dtypes
def test_locations_may_be_float32_beside_other_dtypes(dtype: torch.dtype, backend: str) -> None:
    value, shapes, locations, weights = make(dtype, shapes=((30, 50), (7, 9)))
    exact = locations.detach().float() + 1e-3
    locations = exact.requires_grad_()
    check_op(mmk.deformable_attention, value, shapes, locations, weights, backend=backend)
    (grad,) = torch.autograd.grad(mmk.deformable_attention(value, shapes, locations, weights).sum(), locations)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@few_dtypes
def test_locations_that_are_not_finite_sample_nothing_and_get_no_gradient(
    bad: float, method: Any, dtype: torch.dtype, backend: str
) -> None:
    value, shapes, locations, weights = make(dtype)
    with torch.no_grad():
        locations[0, 1, 0, 0, 2, 0] = bad
        locations[1, 2, 1, 2, 0, 1] = bad
        locations[1, 3] = bad
    (out,) = check_op(mmk.deformable_attention, value, shapes, locations, weights, backend=backend, method=method)
    assert out[1, 3].eq(0).all()
    leaves = (locations, weights)
    out = mmk.deformable_attention(value, shapes, locations, weights, method=method)
    of_locations, of_weights = torch.autograd.grad(out.sum(), leaves)
    hidden = ~locations.isfinite().all(-1)
    assert of_locations[hidden].eq(0).all() and of_weights[hidden].eq(0).all()
    assert of_locations.isfinite().all() and of_weights.isfinite().all()
    without = weights.detach().masked_fill(hidden, 0)
    places = torch.where(hidden.unsqueeze(-1), 0.5, locations.detach())
    torch.testing.assert_close(out, mmk.deformable_attention(value, shapes, places, without, method=method))


def test_huge_locations_lie_beyond_every_map(backend: str) -> None:
    value, shapes, locations, weights = make()
    huge = torch.full_like(locations, 3e38) * torch.randn_like(locations).sign()
    assert mmk.deformable_attention(value, shapes, huge, weights).eq(0).all()
    out = mmk.deformable_attention(value, shapes, huge, weights, method="discrete")
    corner = mmk.deformable_attention(value, shapes, huge.clamp(-9, 9), weights, method="discrete")
    assert torch.equal(out, corner) and not out.eq(0).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_only_the_pixels_around_a_location_are_read(poison: float, backend: str) -> None:
    value = torch.full((1, 25, 1, 17), poison)
    inner = value.view(1, 5, 5, 17)[:, :2, :2]
    inner[...] = 1.0
    places = torch.tensor([[0.0, 0.0], [0.2, 0.2], [0.05, 0.25], [-0.05, 0.1], [1.2, 0.5]]).view(1, 5, 1, 1, 1, 2)
    weights = torch.ones(1, 5, 1, 1, 1).requires_grad_()
    value.requires_grad_()
    places.requires_grad_()
    out = mmk.deformable_attention(value, [(5, 5)], places, weights)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.25, 1.0, 0.75, 0.25, 0.0]))
    for grad in torch.autograd.grad(out.sum(), (value, places, weights)):
        assert grad.isfinite().all()


def test_an_infinite_pixel_of_the_edge_stays_infinite_beside_the_edge(backend: str) -> None:
    value = torch.full((1, 4, 1, 5), torch.inf)
    places = torch.tensor([0.01, 0.01]).view(1, 1, 1, 1, 1, 2)
    out = mmk.deformable_attention(value, [(2, 2)], places, torch.ones(1, 1, 1, 1, 1))
    assert out.eq(torch.inf).all()


def sources(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Shapes, Tensor, Tensor]:
    """Three sources: a camera of two levels, radar of none, lidar of one."""
    value, shapes, locations, weights = make(dtype, shapes=((5, 7), (2, 3), (4, 4)), **options)
    values = [v.detach().requires_grad_() for v in value.split([41, 0, 16], 1)]
    return values, shapes, locations, weights


@each_dtype
def test_several_sources_are_their_concatenation(dtype: torch.dtype, backend: str) -> None:
    values, shapes, locations, weights = sources(dtype)
    (out,) = check_op(mmk.deformable_attention, values, shapes, locations, weights, backend=backend)
    torch.testing.assert_close(out, mmk.deformable_attention(torch.cat(values, 1), shapes, locations, weights))


@pytest.mark.parametrize("method", ["bilinear", "discrete"])
@pytest.mark.parametrize("presence", [[True, True, False], [[True, True, True], [False, True, True]], [False] * 3])
@few_dtypes
def test_absent_sources_are_not_read(presence: Any, method: Any, dtype: torch.dtype, backend: str) -> None:
    values, shapes, locations, weights = sources(dtype)
    mask = torch.tensor(presence)
    options = dict(presence=mask, method=method)
    with torch.no_grad():
        for i, value in enumerate(values):
            value[~mask.expand(2, 3)[:, i]] = torch.nan
    check_op(mmk.deformable_attention, values, shapes, locations, weights, backend=backend, **options)
    out = mmk.deformable_attention(values, shapes, locations, weights, **options)
    level = mask.expand(2, 3)[:, None, None, [0, 0, 2], None]
    clean = [torch.nan_to_num(v.detach()) for v in values]
    torch.testing.assert_close(out, mmk.deformable_attention(clean, shapes, locations, weights * level, method=method))
    grads = torch.autograd.grad(out.sum(), [*values, locations, weights])
    assert all(g.isfinite().all() for g in grads)
    assert grads[-1].masked_select(~level).eq(0).all()


@pytest.mark.parametrize("points", [(4, 2, 0), (1, 1, 1), (0, 0, 0)], ids=str)
@few_dtypes
def test_points_per_level(points: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    value, shapes, locations, weights = make(dtype)
    flat = torch.cat([locations[:, :, :, i, :n] for i, n in enumerate(points)], 3).detach().requires_grad_()
    shares = torch.cat([weights[:, :, :, i, :n] for i, n in enumerate(points)], 3).detach().requires_grad_()
    (out,) = check_op(mmk.deformable_attention, value, shapes, flat, shares, backend=backend, points=points)
    kept = torch.zeros_like(weights)
    for i, n in enumerate(points):
        kept[:, :, :, i, :n] = weights.detach()[:, :, :, i, :n]
    torch.testing.assert_close(out, mmk.deformable_attention(value, shapes, locations, kept))


def test_shapes_may_be_a_tensor_with_any_strides(backend: str) -> None:
    value, shapes, locations, weights = make()
    want = mmk.deformable_attention(value, shapes, locations, weights)
    listed = torch.tensor(shapes)
    for given in (listed, listed.int(), listed.t().contiguous().t(), [list(s) for s in shapes]):
        assert torch.equal(mmk.deformable_attention(value, given, locations, weights), want)


def test_expanded_inputs(backend: str) -> None:
    value, shapes, locations, weights = make(width=16)
    one = [x.detach()[:1].expand_as(x) for x in (value, locations, weights)]
    dense = [x.contiguous() for x in one]
    assert torch.equal(
        mmk.deformable_attention(one[0], shapes, *one[1:]), mmk.deformable_attention(dense[0], shapes, *dense[1:])
    )


def leaves_of(batch: int = 2, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    value, _, locations, weights = make(batch=batch, shapes=((5, 7), (3, 4)), **options)
    return [value, locations, weights]


def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return mmk.deformable_attention(value, [(5, 7), (3, 4)], locations, weights)


def test_maps_of_any_size_compile_once(either_backend: str) -> None:
    def sized(image: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        value = image.flatten(1, 2)
        return mmk.deformable_attention(value, [image.shape[1:3]], locations, weights)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(sized, fullgraph=True, dynamic=True, backend=counter)
    for height, columns in ((5, 13), (6, 9), (10, 11)):
        image = torch.randn(2, height, columns, 3, 8)
        _, _, locations, weights = make(shapes=((height, columns),))
        arguments = (image, locations.detach(), weights.detach())
        assert torch.equal(compiled(*arguments), sized(*arguments))
    assert counter.frame_count == 1


def test_locations_keep_their_dtype_under_autocast(either_backend: str) -> None:
    value, locations, weights = (x.detach().requires_grad_() for x in leaves_of())
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attend(value, locations, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(value.bfloat16(), locations, weights.bfloat16()))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), (value, locations, weights)))


@pytest.mark.parametrize(
    "size",
    [
        dict(batch=1, heads=1, queries=700, width=16),
        dict(batch=1, heads=3, queries=300, width=33),
        dict(batch=2, heads=8, queries=90, width=32, shapes=((60, 70),)),
        dict(batch=1, heads=8, queries=400, width=32),
    ],
    ids=["one head", "three heads", "large maps", "eight heads"],
)
@few_dtypes
def test_results_have_the_same_bits_for_any_number_of_threads(
    size: dict[str, Any], dtype: torch.dtype, native_isa: str
) -> None:
    value, shapes, locations, weights = make(dtype, **size)

    def run() -> list[Tensor]:
        return contract.gradients(
            lambda v, x, w: mmk.deformable_attention(v, shapes, x, w), (value, locations, weights)
        )

    first = run()
    for threads in (2, 3, 5, 1):
        torch.set_num_threads(threads)
        assert same_bits(run(), first), threads


v, x, w = torch.zeros(2, 10, 3, 4), torch.zeros(2, 5, 3, 2, 4, 2), torch.zeros(2, 5, 3, 2, 4)
S = [(2, 3), (2, 2)]
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "value: expected a torch.Tensor; got int", (1, S, x, w), {}),
    (TypeError, "value[1]: expected a torch.Tensor; got NoneType", ([v, None], S, x, w), {}),
    (ValueError, "value: expected a tensor or at least one in a list; got an empty list", ([], S, x, w), {}),
    (TypeError, "sampling_locations: expected a torch.Tensor; got NoneType", (v, S, None, w), {}),
    (TypeError, "attention_weights: expected a torch.Tensor; got float", (v, S, x, 0.5), {}),
    (TypeError, "value: expected dtype float32, bfloat16, float16 or float64; got torch.int64",
     (v.long(), S, x, w), {}),
    (ValueError, "value: expected 4 dims (B, S, H, D); got shape (10, 3, 4)", (v[0], S, x, w), {}),
    (ValueError, "value[1]: expected shape (2, S, 3, 4); got (2, 4, 3, 3)", ([v, v[:, :4, :, 1:]], S, x, w), {}),
    (TypeError, "value[1]: expected the dtype of value[0], torch.float32; got", ([v, v.half()], S, x, w), {}),
    (TypeError, "spatial_shapes: expected a list of pairs (height, width) or a tensor; got int", (v, 3, x, w), {}),
    (TypeError, "spatial_shapes: expected an integer dtype; got torch.float32", (v, torch.ones(2, 2), x, w), {}),
    (ValueError, "spatial_shapes: expected shape (L, 2); got (2, 3)", (v, torch.ones(2, 3).long(), x, w), {}),
    (TypeError, "spatial_shapes[1]: expected a pair of integers (height, width); got (2, 2.0)",
     (v, [(2, 3), (2, 2.0)], x, w), {}),
    (ValueError, "spatial_shapes[0]: expected a pair of sizes (height, width), 0 or more; got (2, 3, 1)",
     (v, [(2, 3, 1), (2, 2)], x, w), {}),
    (ValueError, "spatial_shapes[0]: expected a pair of sizes (height, width), 0 or more; got (-2, -3)",
     (v, [(-2, -3), (2, 2)], x, w), {}),
    (ValueError, "value: expected 9 rows, the pixels of spatial_shapes [(2, 3), (1, 3)]; got 10 in shape",
     (v, [(2, 3), (1, 3)], x, w), {}),
    (ValueError, "value[0]: expected 10 rows, the pixels of spatial_shapes [(2, 3), (2, 2)]; got 8 in shape",
     ([v[:, :8], v[:, 8:]], S, x, w), {}),
    (ValueError, "sampling_locations: expected shape (2, Lq, 3, 2, P, 2); got (2, 5, 3, 1, 4, 2)",
     (v, S, x[:, :, :, :1], w), {}),
    (ValueError, "sampling_locations: expected shape (2, Lq, 3, 2, P, 2); got (2, 5, 3, 8, 2)",
     (v, S, x.flatten(3, 4), w), {}),
    (ValueError, "sampling_locations: expected shape (2, Lq, 3, 5, 2); got (2, 5, 3, 2, 4, 2)",
     (v, S, x, w), {"points": [2, 3]}),
    (TypeError, "sampling_locations: expected the dtype of value, torch.float32, or torch.float32; got torch.float16",
     (v, S, x.half(), w), {}),
    (RuntimeError, f"sampling_locations: expected the device of value, {HERE}; got meta", (v, S, x.to("meta"), w), {}),
    (TypeError, "attention_weights: expected the dtype of value, torch.float32; got torch.float64",
     (v, S, x, w.double()), {}),
    (ValueError, "attention_weights: expected shape (2, 5, 3, 2, 4); got (2, 5, 3, 8)", (v, S, x, w.flatten(3)), {}),
    (TypeError, "points: expected a list of integers; got 4", (v, S, x, w), {"points": 4}),
    (TypeError, "points: expected a list of integers; got [True, 1]", (v, S, x, w), {"points": [True, 1]}),
    (ValueError, "points: expected 2 counts, one for each level; got [1]", (v, S, x, w), {"points": [1]}),
    (ValueError, "points: expected 2 counts, one for each level; got [-1, 2]", (v, S, x, w), {"points": [-1, 2]}),
    (ValueError, "method: expected 'bilinear' or 'discrete'; got 'nearest'", (v, S, x, w), {"method": "nearest"}),
    (TypeError, "method: expected 'bilinear' or 'discrete'; got NoneType", (v, S, x, w), {"method": None}),
    (TypeError, "presence: expected a torch.Tensor; got list", (v, S, x, w), {"presence": [True]}),
    (TypeError, "presence: expected dtype torch.bool; got torch.float32", (v, S, x, w), {"presence": torch.ones(1)}),
    (ValueError, "presence: expected shape (2, 1) or (1,); got (2,)", (v, S, x, w),
     {"presence": torch.ones(2, dtype=torch.bool)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:50] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^deformable_attention: " + re.escape(message)):
        mmk.deformable_attention(*inputs, **options)
