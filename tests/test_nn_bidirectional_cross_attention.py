"""BidirectionalCrossAttention against the same layer in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from environment import DEVICE
from torch import Tensor

from mmkernels.nn import BidirectionalCrossAttention


def plain(
    module: BidirectionalCrossAttention, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The forward in plain torch, from the module's own parameters."""

    def heads(projected: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in projected.chunk(2, -1)]

    x_query, x_value = heads(module.x_in_proj(module.x_norm(x)))
    y_key, y_value = heads(module.y_in_proj(module.y_norm(y)))
    scores = x_query @ y_key.mT * x_query.shape[-1] ** -0.5
    if module.clamp is not None:
        scores = scores.clamp(-module.clamp, module.clamp)

    def attend(scores: Tensor, mask: Tensor | None, value: Tensor) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    x_out = module.x_out_proj(attend(scores, y_mask, y_value))
    y_out = module.y_out_proj(attend(scores.mT, x_mask, x_value))
    x_scale = 1 if module.x_scale is None else module.x_scale
    y_scale = 1 if module.y_scale is None else module.y_scale
    return x + x_scale * x_out, y + y_scale * y_out


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no scales": dict(layer_scale=None),
    "a tight clamp, no biases": dict(clamp=0.2, bias=False),
    "no clamp": dict(clamp=None, eps=1e-3),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_output_and_gradients_equal_plain_torch(options: str, padded: bool, backend: str) -> None:
    module = BidirectionalCrossAttention(12, 20, 24, 3, **OPTIONS[options])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, y = torch.randn(2, 9, 12, requires_grad=True), torch.randn(2, 5, 20, requires_grad=True)
    x_mask = torch.arange(9) < torch.tensor([[9], [4]]) if padded else None
    y_mask = torch.arange(5) < torch.tensor([[2], [5]]) if padded else None
    ours, want = module(x, y, x_mask=x_mask, y_mask=y_mask), plain(module, x, y, x_mask, y_mask)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    leaves = [x, y, *module.parameters()]
    grads = (torch.autograd.grad(sum(t.sin().sum() for t in outs), leaves) for outs in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_parameters_and_their_initialisation() -> None:
    module = BidirectionalCrossAttention(6, 10, 8, 2, layer_scale=0.25, dtype=torch.float64)
    names = dict(module.named_parameters())
    assert all(p.dtype == torch.float64 for p in names.values())
    assert names["x_in_proj.weight"].shape == (16, 6) and names["y_out_proj.weight"].shape == (10, 8)
    assert not names["y_in_proj.bias"].any() and torch.equal(names["x_norm.weight"], torch.ones(6).double())
    assert torch.equal(names["y_scale"], torch.full((10,), 0.25).double())
    assert "x_scale" not in dict(BidirectionalCrossAttention(6, 10, 8, 2, layer_scale=None).named_parameters())
    copy = BidirectionalCrossAttention(6, 10, 8, 2, layer_scale=0.25, dtype=torch.float64)
    copy.load_state_dict(module.state_dict())
    x, y = torch.randn(1, 3, 6).double(), torch.randn(1, 5, 10).double()
    assert all(torch.equal(a, b) for a, b in zip(copy(x, y), module(x, y), strict=True))


def test_under_autocast_and_compile() -> None:
    module = BidirectionalCrossAttention(16, 8, 16, 2)
    x, y = torch.randn(2, 7, 16), torch.randn(2, 3, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(t.isfinite().all() for t in module(x, y))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"embed_dim: expected a multiple of num_heads, 3; got 8"):
        BidirectionalCrossAttention(8, 8, 8, 3)
