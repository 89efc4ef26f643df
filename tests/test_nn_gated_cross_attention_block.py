"""GatedCrossAttentionBlock against the same block in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from environment import DEVICE
from torch import Tensor

from mmkernels.nn import GatedCrossAttentionBlock


def plain(block: GatedCrossAttentionBlock, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """The forward in plain torch, from the block's own parameters."""

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)

    key, value = block.key_value_proj(context).chunk(2, -1)
    q, k, v = heads(block.query_proj(block.norm(x))), heads(key), heads(value)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = x + torch.tanh(block.attention_gate) * block.out_proj(attended)
    if block.feedforward_norm is None:
        return x
    hidden = block.feedforward_in(block.feedforward_norm(x))
    hidden = F.gelu(hidden) if block.activation == "gelu" else F.silu(hidden)
    return x + torch.tanh(block.feedforward_gate) * block.feedforward_out(hidden)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another context, biases": dict(context_dim=7, bias=True),
    "narrow heads, small hidden layer": dict(head_dim=5, feedforward_dim=9, activation="silu"),
    "attention alone": dict(feedforward_dim=0, context_dim=20, eps=1e-3),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", ["", "lengths", "mask"])
def test_output_and_gradients_equal_plain_torch(options: str, masked: str, backend: str) -> None:
    block = GatedCrossAttentionBlock(12, 3, **OPTIONS[options])
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 12, requires_grad=True)
    context = torch.randn(2, 9, OPTIONS[options].get("context_dim", 12), requires_grad=True)
    given: dict[str, Any] = {}
    mask = None
    if masked == "lengths":
        given = {"key_lengths": torch.tensor([9, 4])}
        mask = torch.arange(9) < given["key_lengths"][:, None, None, None]
    elif masked == "mask":
        mask = torch.rand(2, 1, 5, 9) > 0.3
        given = {"attn_mask": mask}
    ours, want = block(x, context, **given), plain(block, x, context, mask)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    leaves = [x, context, *block.parameters()]
    grads = (torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_new_block_returns_its_input_and_learns(backend: str) -> None:
    block = GatedCrossAttentionBlock(8, 2)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    out = block(x, context)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert block.attention_gate.grad is not None and block.attention_gate.grad.abs() > 0
    assert block.feedforward_gate.grad is not None and block.feedforward_gate.grad.abs() > 0


def test_a_token_that_sees_nothing_gets_nothing_of_the_context(backend: str) -> None:
    block = GatedCrossAttentionBlock(8, 2, feedforward_dim=0)
    torch.nn.init.ones_(block.attention_gate)
    x, context = torch.randn(1, 3, 8), torch.full((1, 4, 8), torch.nan)
    mask = torch.tensor([False, False, True])[:, None].expand(3, 4)
    out = block(x, context, attn_mask=mask)
    assert torch.equal(out[:, :2], x[:, :2]) and out[:, 2].isnan().all()


def test_parameters_and_their_initialisation() -> None:
    block = GatedCrossAttentionBlock(16, 4, context_dim=24, bias=True, dtype=torch.float64)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes["key_value_proj.weight"] == (32, 24) and shapes["feedforward_in.weight"] == (64, 16)
    assert shapes["attention_gate"] == shapes["feedforward_gate"] == ()
    assert all(p.dtype == torch.float64 for p in block.parameters())
    for parameter in block.parameters():
        torch.nn.init.constant_(parameter, 3.0)
    block.reset_parameters()
    assert not block.attention_gate and not block.feedforward_gate and torch.equal(block.norm.weight, torch.ones(16))
    assert block.query_proj.weight.unique().numel() > 1
    names = {n.split(".")[0] for n, _ in GatedCrossAttentionBlock(16, 4, feedforward_dim=0).named_parameters()}
    assert names == {"norm", "query_proj", "key_value_proj", "out_proj", "attention_gate"}


def test_under_autocast_and_compile() -> None:
    block = GatedCrossAttentionBlock(8, 2)
    torch.nn.init.ones_(block.attention_gate)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = block(x, context)
    assert out.dtype == torch.float32  # the residual stream keeps its digits
    torch.testing.assert_close(out, block(x, context), rtol=5e-2, atol=5e-2)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), block(x, context))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match=r"embed_dim: expected a multiple of num_heads, 3 \(or head_dim\); got 8"):
        GatedCrossAttentionBlock(8, 3)
