"""JointAttention against the same layer in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from environment import DEVICE
from torch import Tensor

from mmkernels.nn import JointAttention
from mmkernels.ops.norm_rotary.reference import rotate


def plain(module: JointAttention, streams: list[Tensor], mask: Tensor | None, tables: Any = None) -> list[Tensor]:
    """The forward in plain torch, from the module's own parameters."""
    heads: list[list[Tensor]] = [[], [], []]
    for i, x in enumerate(streams):
        counts = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        parts = module.in_proj[i](x).split([n * module.head_dim for n in counts], -1)
        for j, part in enumerate(parts):
            part = part.unflatten(-1, (counts[j], -1)).transpose(1, 2)
            weights = (module.query_norm_weights, module.key_norm_weights, None)[j]
            if weights is not None:
                part = F.rms_norm(part, part.shape[-1:], weights[i], module.eps)
            if tables is not None and tables[i] is not None and j < 2:
                by = [t.unsqueeze(1) if t.dim() == 3 else t for t in tables[i]]
                part = rotate(part, *by, module.rotary == "interleaved")
            heads[j].append(part)
    out = F.scaled_dot_product_attention(*(torch.cat(x, 2) for x in heads), attn_mask=mask, enable_gqa=True)
    split = out.transpose(1, 2).flatten(2).split([x.shape[1] for x in streams], 1)
    return [module.out_proj[i](y) for i, y in enumerate(split)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "query and key norm": dict(qk_norm=True),
    "narrow heads without bias": dict(head_dim=5, bias=False),
    "everything": dict(head_dim=6, qk_norm=True, eps=1e-3),
    "one head of keys": dict(num_kv_heads=1, qk_norm=True, head_dim=4),
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_output_and_gradients_equal_plain_torch(options: str, padded: bool, backend: str) -> None:
    module = JointAttention([12, 20, 7], 3, **OPTIONS[options])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    streams = [torch.randn(2, n, w, requires_grad=True) for n, w in zip((4, 9, 1), (12, 20, 7), strict=True)]
    lengths, mask = None, None
    if padded:
        lengths = [None, torch.tensor([9, 2]), None]
        mask = torch.ones(2, 1, 1, 14, dtype=torch.bool)
        mask[1, :, :, 6:13] = False
    ours, want = module(streams, key_lengths=lengths), plain(module, streams, mask)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    leaves = [*streams, *module.parameters()]
    grads = (torch.autograd.grad(sum(y.sin().sum() for y in outs), leaves) for outs in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("rotary", ["halves", "interleaved"])
def test_streams_with_positions_are_rotated(rotary: Any, norm: bool, backend: str) -> None:
    module = JointAttention([12, 20, 7], 3, head_dim=8, num_kv_heads=1, qk_norm=norm, rotary=rotary)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    streams = [torch.randn(2, n, w, requires_grad=True) for n, w in zip((4, 9, 1), (12, 20, 7), strict=True)]
    tables = [(torch.rand(4, 3), torch.rand(4, 3)), (torch.rand(2, 9, 4), torch.rand(2, 9, 4)), None]
    ours, want = module(streams, tables=tables), plain(module, streams, None, tables)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    leaves = [*streams, *module.parameters()]
    grads = (torch.autograd.grad(sum(y.sin().sum() for y in outs), leaves) for outs in (ours, want))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(y.dtype == torch.bfloat16 for y in module(streams, tables=tables))


def test_tables_come_with_rotary_one_per_stream() -> None:
    x, table = torch.randn(1, 2, 8), (torch.rand(2, 2), torch.rand(2, 2))
    rotated = JointAttention([8], 2, rotary="halves")
    with pytest.raises(ValueError, match=r"^JointAttention: tables: expected None without rotary; got tables"):
        JointAttention([8], 2)([x], tables=[table])
    with pytest.raises(ValueError, match=r"^JointAttention: tables: expected \(cos, sin\) or None of 1 streams"):
        rotated([x])
    with pytest.raises(ValueError, match=r"^JointAttention: tables: expected 1, one per stream; got 2"):
        rotated([x], tables=[table, table])
    with pytest.raises(ValueError, match=r"^norm_rotary: cos: expected shape"):
        rotated([x], tables=[(table[0][:1], table[1][:1])])
    with pytest.raises(ValueError, match=r"^JointAttention: rotary: expected None, 'halves' or 'interleaved'"):
        JointAttention([8], 2, rotary=True)  # type: ignore[arg-type]


def test_dropout_is_applied_in_training_alone() -> None:
    module = JointAttention([12, 8], 4, dropout=0.5, num_kv_heads=2)
    streams = [torch.randn(2, n, w) for n, w in ((4, 12), (9, 8))]
    first, second = module(streams), module(streams)
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(module.eval()(streams), plain(module, streams, None))
    with pytest.raises(ValueError, match=r"^JointAttention: dropout: expected a probability in \[0, 1\]; got 2"):
        JointAttention([12], 3, dropout=2.0)
    with pytest.raises(ValueError, match=r"^JointAttention: num_kv_heads: expected a divisor of num_heads, 4; got 3"):
        JointAttention([12], 4, num_kv_heads=3)


def test_a_stream_that_is_forbidden_changes_nothing() -> None:
    module = JointAttention([8, 8], 2)
    text, image = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    bias = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    first, second = (module([text, x], stream_bias=bias) for x in (image, image * 3))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_parameters_and_their_initialisation() -> None:
    module = JointAttention([64, 32], 4, qk_norm=True, dtype=torch.float64)
    names = {name: p for name, p in module.named_parameters()}
    assert {n for n in names if n.endswith(".0") or ".0." in n} == {
        "in_proj.0.weight",
        "in_proj.0.bias",
        "out_proj.0.weight",
        "out_proj.0.bias",
        "query_norm_weights.0",
        "key_norm_weights.0",
    }
    assert all(p.dtype == torch.float64 for p in names.values())
    assert names["in_proj.1.weight"].shape == (3 * 64, 32) and names["out_proj.1.weight"].shape == (32, 64)
    assert not names["in_proj.0.bias"].any() and torch.equal(names["key_norm_weights.1"], torch.ones(16).double())
    copy = JointAttention([64, 32], 4, qk_norm=True, dtype=torch.float64)
    copy.load_state_dict(module.state_dict())
    streams = [torch.randn(1, 3, 64).double(), torch.randn(1, 5, 32).double()]
    assert all(torch.equal(a, b) for a, b in zip(copy(streams), module(streams), strict=True))


def test_under_autocast_and_compile() -> None:
    module = JointAttention([16, 8], 2, qk_norm=True)
    streams = [torch.randn(2, 3, 16), torch.randn(2, 5, 8)]
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = module(streams)
    assert all(y.dtype == torch.bfloat16 for y in outs)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(streams), module(streams))


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="embed_dims: expected at least one stream; got none"):
        JointAttention([], 2)
    with pytest.raises(ValueError, match=r"embed_dims\[0\]: expected a multiple of num_heads, 3 \(or"):
        JointAttention([8, 9], 3)
    with pytest.raises(ValueError, match="streams: expected 2 tensors; got 1"):
        JointAttention([8, 8], 2)([torch.randn(1, 2, 8)])
