"""The concatenation-fusion ops together."""

from __future__ import annotations

import torch
from fusion_cases import leaf
from torch import Tensor

import mmkernels as mmk


def test_inductor_compiles_a_chain_of_all_ops(either_backend: str) -> None:
    def model(xs: list[Tensor], weight: Tensor, h: Tensor) -> Tensor:
        y = mmk.concat_linear([x * 2 for x in xs], weight, activation="gelu")
        y = mmk.concat_norm_linear([y, *xs], h, None, weight.new_ones(7, 19), norm="rms").relu()
        y = mmk.gated_fusion([y, xs[0]], [weight.new_ones(7, 7), weight[:, :5]], None, weight)
        return mmk.gated_concat(y, xs[2], y.new_ones(1, 13)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    leaves = [*(leaf(4, k) for k in (5, 1, 6)), leaf(7, 12), leaf(19)]
    got, want = compiled(leaves[:3], *leaves[3:]), model(leaves[:3], *leaves[3:])
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_tuple_of_modalities_is_as_good_as_a_list(either_backend: str) -> None:
    xs, weight = [leaf(4, k) for k in (5, 1, 6)], leaf(7, 12)
    weights, gate = [leaf(7, k) for k in (5, 1, 6)], leaf(21, 12)
    assert torch.equal(mmk.concat_linear(tuple(xs), weight), mmk.concat_linear(xs, weight))
    norm = (leaf(12), leaf(12), weight)
    assert torch.equal(mmk.concat_norm_linear(tuple(xs), *norm), mmk.concat_norm_linear(xs, *norm))
    fused = mmk.gated_fusion(tuple(xs), tuple(weights), None, gate)
    assert torch.equal(fused, mmk.gated_fusion(xs, weights, None, gate))
