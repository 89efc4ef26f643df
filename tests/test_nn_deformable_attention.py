"""DeformableAttention against the layer of Deformable DETR in plain torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_deformable_attention import by_grid_sample
from torch import Tensor

from mmkernels.nn import DeformableAttention

SHAPES = [(5, 7), (3, 4)]


def plain(module: DeformableAttention, query: Tensor, value: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
    """The forward in plain torch, from the module's own parameters."""
    heads, levels, count = module.num_heads, module.num_levels, module.num_points
    batch, queries, _ = query.shape
    value = module.value_proj(value)
    if mask is not None:
        value = value.masked_fill(~mask[..., None], 0.0)
    value = value.view(batch, value.shape[1], heads, -1)
    offsets = module.sampling_offsets(query).view(batch, queries, heads, levels, count, 2)
    weights = module.attention_weights(query).view(batch, queries, heads, levels * count).softmax(-1)
    if points.shape[-1] == 2:
        sizes = torch.tensor([[w, h] for h, w in SHAPES])
        locations = points[:, :, None, :, None] + offsets / sizes[None, None, None, :, None]
    else:
        locations = points[:, :, None, :, None, :2] + offsets / count * points[:, :, None, :, None, 2:] * 0.5
    out = by_grid_sample(value, SHAPES, locations, weights.view(batch, queries, heads, levels, count))
    return module.output_proj(out)


def make(**options: Any) -> DeformableAttention:
    module = DeformableAttention(24, 3, 2, 4, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
def test_output_and_gradients_equal_plain_torch(numbers: int, masked: bool, bias: bool, backend: str) -> None:
    module = make(bias=bias)
    query, value = torch.randn(2, 6, 24, requires_grad=True), torch.randn(2, 47, 24, requires_grad=True)
    points = torch.rand(2, 6, 2, numbers, requires_grad=True)
    mask = torch.rand(2, 47) < 0.7 if masked else None
    ours, want = module(query, value, points, SHAPES, value_mask=mask), plain(module, query, value, points, mask)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    leaves = [query, value, points, *module.parameters()]
    grads = (torch.autograd.grad(out.sin().sum(), leaves) for out in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_list_of_sources_is_their_concatenation(either_backend: str) -> None:
    module = make()
    query, values = torch.randn(2, 6, 24), [torch.randn(2, 35, 24), torch.randn(2, 12, 24)]
    points = torch.rand(2, 6, 1, 2)
    masks = [torch.rand(2, 35) < 0.7, None]
    got = module(query, values, points, torch.tensor(SHAPES), value_mask=masks)
    whole = torch.cat([masks[0], torch.ones(2, 12, dtype=torch.bool)], 1)
    torch.testing.assert_close(got, module(query, torch.cat(values, 1), points, SHAPES, value_mask=whole))
    absent = module(query, values, points, SHAPES, presence=torch.tensor([False, True]))
    values[0] = torch.full_like(values[0], torch.nan)
    assert torch.equal(module(query, values, points, SHAPES, presence=torch.tensor([False, True])), absent)


def test_state_dict_has_the_common_names_and_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in DeformableAttention(24, 3, 2, 4).state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (48, 24),
        "sampling_offsets.bias": (48,),
        "attention_weights.weight": (24, 24),
        "attention_weights.bias": (24,),
        "value_proj.weight": (24, 24),
        "value_proj.bias": (24,),
        "output_proj.weight": (24, 24),
        "output_proj.bias": (24,),
    }


def test_at_first_heads_look_in_directions_of_their_own_at_growing_distances() -> None:
    module = DeformableAttention(32, 4, 2, 3)
    offsets = module.sampling_offsets(torch.randn(1, 1, 32)).view(4, 2, 3, 2)
    want = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        torch.testing.assert_close(offsets[:, 1, point], want * (point + 1), rtol=1e-5, atol=1e-6)
    assert module.attention_weights(torch.randn(1, 1, 32)).eq(0).all()


def test_hooks_of_its_projections_run() -> None:
    module, seen = make(), []
    for name, child in module.named_children():
        child.register_forward_hook(lambda *_, name=name: seen.append(name))
    module(torch.randn(1, 2, 24), torch.randn(1, 47, 24), torch.rand(1, 2, 2, 2), SHAPES)
    assert sorted(seen) == ["attention_weights", "output_proj", "sampling_offsets", "value_proj"]


def test_autocast_and_compile(either_backend: str) -> None:
    module = make()
    arguments = (torch.randn(2, 6, 24), torch.randn(2, 47, 24), torch.rand(2, 6, 2, 2), SHAPES)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(*arguments), rtol=0.1, atol=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), module(*arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeformableAttention(10, 3), "embed_dim: expected a multiple of num_heads, 3; got 10"),
        (
            lambda: make()(torch.zeros(2, 24), torch.zeros(1, 47, 24), torch.zeros(1, 2, 2, 2), SHAPES),
            "query: expected shape (B, Lq, 24); got (2, 24)",
        ),
        (
            lambda: make()(torch.zeros(1, 2, 24), torch.zeros(1, 47, 24), torch.zeros(1, 2, 2, 3), SHAPES),
            "reference_points: expected shape (1, 2, 2) and 2 or 4 numbers; got (1, 2, 2, 3)",
        ),
        (
            lambda: make()(torch.zeros(1, 2, 24), [torch.zeros(1, 47, 24)], torch.zeros(1, 2, 2, 2), SHAPES,
                           value_mask=[None, None]),
            "value_mask: expected as many masks as values, 1; got 2",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^DeformableAttention: " + re.escape(message)):
        call()
