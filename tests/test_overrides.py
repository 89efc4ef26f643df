"""Modules as leaves of traces, and recorded graphs that read as code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import flat
from torch import Tensor, fx, nn

import mmkernels as mmk


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_a_recorded_graph_pickles_and_reads_as_code() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return mmk.concat_linear([a, b], self.weight, activation="relu") * 2

    Model.forward.__annotations__.clear()  # torch.fx does not pickle those that are strings
    model, a, b = Model(), torch.randn(3, 4), torch.randn(3, 2)
    graph = fx.symbolic_trace(model)
    assert "concat_linear([a, b], weight" in graph.code.replace("self.", "")
    assert torch.equal(pickle.loads(pickle.dumps(graph))(a, b), model(a, b))


def _pair() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4), torch.randn(3, 4)


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8), torch.randn(2, 5, 8)


# Each module, how a model calls it on two tensors, and those.
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Callable[[], tuple[Tensor, Tensor]]]] = {
    "AdditiveAttentionPool": (lambda: mmk.nn.AdditiveAttentionPool(4, 3), lambda m, a, b: m([a, b]), _pair),
    "MultiplicativeAttentionPool": (
        lambda: mmk.nn.MultiplicativeAttentionPool(4),
        lambda m, a, b: m([a, b], query=a),
        _pair,
    ),
    "MultimodalCrossEntropy": (
        lambda: mmk.nn.MultimodalCrossEntropy(2),
        lambda m, a, b: m([a, b], torch.tensor([0, 3, 1])),
        _pair,
    ),
    "SplitAttentionPool": (lambda: mmk.nn.SplitAttentionPool(4, 2, 3), lambda m, a, b: m([a, b]), _pair),
    "DecisionFusion": (lambda: mmk.nn.DecisionFusion(2, learnable=True), lambda m, a, b: m([a, b]), _pair),
    "ContrastiveLoss": (mmk.nn.ContrastiveLoss, lambda m, a, b: m(a, b), _pair),
    "SigmoidContrastiveLoss": (mmk.nn.SigmoidContrastiveLoss, lambda m, a, b: m(a, b), _pair),
    "DistillationLoss": (lambda: mmk.nn.DistillationLoss(temperature=2.0), lambda m, a, b: m(a, b), _pair),
    "DeformableAttention": (
        lambda: mmk.nn.DeformableAttention(8, 2, 1, 2),
        lambda m, a, b: m(a, b, torch.full((2, 3, 1, 2), 0.4), [(1, 5)]),
        _tokens,
    ),
    "ConcatFusion": (lambda: mmk.nn.ConcatFusion([4, 4], 5, missing="learned"), lambda m, a, b: m([a, b]), _pair),
    "GatedFusion": (lambda: mmk.nn.GatedFusion([4, 4], 5), lambda m, a, b: m([a, b]), _pair),
    "LowRankFusion": (lambda: mmk.nn.LowRankFusion([4, 4], 5, 2), lambda m, a, b: m([a, b]), _pair),
    "TensorFusion": (lambda: mmk.nn.TensorFusion([4, 4], 5), lambda m, a, b: m([a, b]), _pair),
    "MultiheadCrossAttention": (
        lambda: mmk.nn.MultiheadCrossAttention(8, 2, batch_first=True),
        lambda m, a, b: m(a, b, b, need_weights=False)[0],
        _tokens,
    ),
    "JointAttention": (lambda: mmk.nn.JointAttention([8, 8], 2), lambda m, a, b: m([a, b])[1], _tokens),
    "BidirectionalCrossAttention": (
        lambda: mmk.nn.BidirectionalCrossAttention(8, 8, 8, 2),
        lambda m, a, b: m(a, b),
        _tokens,
    ),
    "GatedCrossAttentionBlock": (
        lambda: mmk.nn.GatedCrossAttentionBlock(8, 2),
        lambda m, a, b: m(a, b, key_lengths=None),
        _tokens,
    ),
    "TokenFusionEmbedding": (
        lambda: mmk.nn.TokenFusionEmbedding(2, 8, max_lengths=(4, None)),
        lambda m, a, b: m([a, b]),
        _tokens,
    ),
}


class Holder(nn.Module):
    def __init__(self, part: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([part])
        self.call = call

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.call(self.parts[0], a * 2, b)


Holder.forward.__annotations__.clear()  # torch.fx does not pickle those that are strings


def test_every_module_has_a_case() -> None:
    assert set(MODULES) == set(mmk.nn.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_a_leaf_of_a_trace(name: str) -> None:
    make, call, inputs = MODULES[name]
    model, (a, b) = Holder(make(), call), inputs()
    graph = fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["parts.0"]
    assert equal(graph(a, b), model(a, b))
    assert equal(fx.symbolic_trace(graph)(a, b), model(a, b)), "traced again"
    assert equal(pickle.loads(pickle.dumps(graph))(a, b), model(a, b)), "pickled"


def test_a_subclass_with_a_forward_of_its_own_is_traced_through() -> None:
    class Doubled(mmk.nn.GatedFusion):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward([a, b])

    model, (a, b) = Holder(Doubled([4, 4], 5), lambda m, a, b: m(a, b)), _pair()
    graph = fx.symbolic_trace(model)
    assert mmk.gated_fusion in [n.target for n in graph.graph.nodes]
    assert torch.equal(graph(a, b), model(a, b))


def test_a_module_of_ours_is_traced_by_itself() -> None:
    model, (a, b) = mmk.nn.GatedFusion([4, 4], 5), _pair()
    assert torch.equal(fx.symbolic_trace(model)([a, b]), model([a, b]))
