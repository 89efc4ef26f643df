"""MultiheadCrossAttention against torch.nn.MultiheadAttention with the same parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels as mmk

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other key and value features": dict(kdim=10, vdim=12),
    "no biases": dict(bias=False),
    "appended bias token": dict(add_bias_kv=True),
    "appended zero token": dict(add_zero_attn=True),
    "both appended, other features": dict(add_bias_kv=True, add_zero_attn=True, kdim=10, vdim=12),
}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, mmk.nn.MultiheadCrossAttention]:
    torchs = nn.MultiheadAttention(16, 4, **options)
    ours = mmk.nn.MultiheadCrossAttention(16, 4, **options)
    with torch.no_grad():
        for p in torchs.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


def inputs(batch_first: bool = True, kdim: int = 16, vdim: int = 16, **_: Any) -> list[Tensor]:
    x = [torch.randn(3, 5, 16), torch.randn(3, 7, kdim), torch.randn(3, 7, vdim)]
    return [(t if batch_first else t.transpose(0, 1)).requires_grad_() for t in x]


def masks() -> dict[str, dict[str, Tensor]]:
    padding = torch.arange(7) >= torch.tensor([7, 4, 1])[:, None]
    forbidden = torch.rand(5, 7) > 0.7
    per_head = torch.rand(12, 5, 7) > 0.7
    forbidden[:, 0] = False
    per_head[..., 0] = False
    bias = torch.randn(5, 7)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": forbidden},
        "bool per head": {"attn_mask": per_head},
        "float": {"attn_mask": bias},
        "float per head": {"attn_mask": torch.randn(12, 5, 7)},
        "bool and padding": {"attn_mask": forbidden, "key_padding_mask": padding},
        "float and float padding": {
            "attn_mask": bias,
            "key_padding_mask": torch.zeros(3, 7).masked_fill(padding, -torch.inf),
        },
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["B L E", "L B E"])
def test_outputs_weights_and_gradients_are_torchs(kind: str, batch_first: bool, backend: str) -> None:
    options = KINDS[kind] | {"batch_first": batch_first}
    torchs, ours = pair(**options)
    for mask, need_weights, average in itertools.product(masks().values(), (False, True), (False, True)):
        x = inputs(**options)
        call: dict[str, Any] = {**mask, "need_weights": need_weights, "average_attn_weights": average}
        got, got_weights = ours(*x, **call)
        want, want_weights = torchs(*x, **call)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert (got_weights is None) == (not need_weights)
        if need_weights:
            torch.testing.assert_close(got_weights, want_weights, rtol=1e-4, atol=1e-5)
        leaves = [*x, *ours.parameters()]
        got_grads = torch.autograd.grad(got.sin().sum(), leaves)
        want_grads = torch.autograd.grad(want.sin().sum(), [*x, *torchs.parameters()])
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
def test_unbatched_input(need_weights: bool, backend: str) -> None:
    torchs, ours = pair()
    q, k, v = (t[0].detach() for t in inputs())
    padding = torch.arange(7) >= 4
    got, want = (m(q, k, v, key_padding_mask=padding, need_weights=need_weights) for m in (ours, torchs))
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_causal_hint(appended: bool, need_weights: bool, backend: str) -> None:
    torchs, ours = pair(batch_first=True, add_zero_attn=appended)
    x = inputs()[0]
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    want = torchs(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
    for options in ({"attn_mask": mask, "is_causal": True}, {"is_causal": True}, {"attn_mask": mask}):
        torch.testing.assert_close(ours(x, x, x, need_weights=need_weights, **options)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_fully_padded_example_gives_the_output_bias(need_weights: bool, backend: str) -> None:
    _, ours = pair(batch_first=True)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1] = True
    out = ours(*inputs(), key_padding_mask=padding, need_weights=need_weights)[0]
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(5, 16))
    assert out.isfinite().all()


def test_dropout_is_applied_in_training_alone(backend: str) -> None:
    ours = mmk.nn.MultiheadCrossAttention(16, 4, dropout=0.5, batch_first=True)
    x = inputs()
    assert not torch.equal(ours(*x, need_weights=False)[0], ours(*x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(*x, need_weights=False)[0], ours(*x, need_weights=False)[0])


@pytest.mark.parametrize("batch_first", [True, False], ids=["B L E", "L B E"])
def test_heads_are_views_and_the_output_is_merged_without_a_copy(
    batch_first: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmkernels.nn import multihead_cross_attention as module

    seen: list[Tensor] = []

    def spy(*args: Tensor, **kwargs: Any) -> Tensor:
        seen.append(out := mmk.cross_attention(*args, **kwargs))
        assert all(x._is_view() for x in args)
        return out

    monkeypatch.setattr(module, "cross_attention", spy)
    _, ours = pair(batch_first=batch_first)
    with torch.no_grad():
        ours(*inputs(batch_first), need_weights=False)
    order = (0, 2, 1, 3) if batch_first else (2, 0, 1, 3)
    assert seen[0].permute(order).is_contiguous()


def test_compile_and_low_precision(backend: str) -> None:
    torch._dynamo.reset()
    ours = mmk.nn.MultiheadCrossAttention(16, 4, batch_first=True, dtype=torch.bfloat16)
    x = [t.detach().bfloat16() for t in inputs()]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*x, need_weights=False)[0], ours(*x, need_weights=False)[0])


def test_bad_shapes_are_named() -> None:
    _, ours = pair(batch_first=True)
    x = inputs()
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(5, 7\) or \(12, 5, 7\); got \(5, 6\)"):
        ours(*x, attn_mask=torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"key_padding_mask: expected shape \(3, 7\); got \(3, 6\)"):
        ours(*x, key_padding_mask=torch.zeros(3, 6))
    with pytest.raises(ValueError, match="expected 2 or 3 dims alike"):
        ours(x[0], x[1][0], x[2])
