"""The modules of the attention pools against their ops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mmkernels as mmk
from mmkernels.nn import AdditiveAttentionPool, MultiplicativeAttentionPool, SplitAttentionPool

Outputs = tuple[Tensor, Tensor]

# How each module is made, called, and written as its op.
MODULES: dict[
    str,
    tuple[
        Callable[..., nn.Module],
        Callable[[nn.Module, Tensor, Tensor], Outputs],
        Callable[..., Outputs],
    ],
] = {
    "additive": (
        lambda **k: AdditiveAttentionPool(6, 5, **k),
        lambda m, xs, q: m(xs),
        lambda m, xs, q: mmk.additive_attention_pool(xs, m.weight, m.vector, bias=m.bias),
    ),
    "additive with query": (
        lambda **k: AdditiveAttentionPool(6, 5, bias=False, query_features=4, **k),
        lambda m, xs, q: m(xs, q, torch.tensor([True, False, True])),
        lambda m, xs, q: mmk.additive_attention_pool(
            xs,
            m.weight,
            m.vector,
            query=q,
            query_weight=m.query_weight,
            presence=torch.tensor([True, False, True]),
        ),
    ),
    "multiplicative": (
        lambda **k: MultiplicativeAttentionPool(6, 4, scale=0.3, **k),
        lambda m, xs, q: m(xs, q),
        lambda m, xs, q: mmk.multiplicative_attention_pool(xs, q, weight=m.weight, scale=0.3),
    ),
    "split": (
        lambda **k: SplitAttentionPool(6, 3, 5, "gelu", **k),
        lambda m, xs, q: m(xs),
        lambda m, xs, q: mmk.split_attention_pool(xs, m.weight1, m.bias1, m.weight2, m.bias2, activation="gelu"),
    ),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_modules_are_their_ops_on_their_parameters(name: str, dtype: torch.dtype) -> None:
    make, run, op = MODULES[name]
    xs, query = torch.randn(7, 3, 6, dtype=dtype), torch.randn(7, 4, dtype=dtype)
    module = make(dtype=dtype)
    assert all(p.isfinite().all() and p.dtype == dtype for p in module.parameters())
    for got, want in zip(run(module, xs, query), op(module, xs, query), strict=True):
        assert torch.equal(got, want)
    sum(o.sin().sum() for o in run(module, xs, query)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
    other = make(dtype=dtype)
    assert not torch.equal(run(other, xs, query)[0], run(module, xs, query)[0])
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(run(other, xs, query)[0], run(module, xs, query)[0])


@pytest.mark.parametrize("name", MODULES)
def test_modules_on_meta_and_their_representation(name: str) -> None:
    module = MODULES[name][0](device="meta")
    assert all(p.device.type == "meta" for p in module.parameters())
    assert "features=6" in repr(module)


def test_without_query_features_a_query_is_as_wide_as_the_modalities() -> None:
    module = MultiplicativeAttentionPool(6)
    assert not list(module.parameters())
    xs, query = torch.randn(7, 3, 6), torch.randn(7, 6)
    assert torch.equal(module(xs, query)[0], mmk.multiplicative_attention_pool(xs, query)[0])


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="SplitAttentionPool: activation: expected None or one of relu"):
        SplitAttentionPool(6, 2, 5, "softmax")  # type: ignore[arg-type]
