"""ConcatFusion and GatedFusion against the same modules written in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import flat, presence_patterns, spoiled
from torch import Tensor, nn

import mmkernels as mmk

WIDTHS = (5, 1, 6)
PLAIN = {None: lambda x: x, "gelu": F.gelu, "relu": F.relu}


def inputs(*lead: int, widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    return [torch.randn(*lead, k, requires_grad=True) for k in widths]


def shuffled(module: nn.Module) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (9,), (2, 3)], ids=str)
def test_concat_fusion_is_a_linear_layer_of_the_concatenation(
    activation: Any, bias: bool, lead: tuple[int, ...], either_backend: str
) -> None:
    linear = shuffled(nn.Linear(12, 7, bias))
    fuse = mmk.nn.ConcatFusion(WIDTHS, 7, bias, activation=activation)
    fuse.load_state_dict(linear.state_dict())
    xs = inputs(*lead)
    got, want = fuse(xs), PLAIN[activation](linear(torch.cat(xs, -1)))
    torch.testing.assert_close(got, want)
    got_grads = torch.autograd.grad(got.sin().sum(), [*xs, *fuse.parameters()])
    want_grads = torch.autograd.grad(want.sin().sum(), [*xs, *linear.parameters()])
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["zeros", "learned"])
@pytest.mark.parametrize("activation", PLAIN)
def test_concat_fusion_replaces_what_is_missing(missing: Any, activation: Any, either_backend: str) -> None:
    fuse = shuffled(mmk.nn.ConcatFusion(WIDTHS, 7, activation=activation, missing=missing))
    parameters = list(fuse.parameters())
    for presence in presence_patterns(9, 3).values():
        xs = spoiled(inputs(9), presence, math.nan)
        vectors = fuse.missing_vectors or [torch.zeros(k) for k in WIDTHS]
        replaced = [
            torch.where(presence[..., i : i + 1], x, v) for i, (x, v) in enumerate(zip(xs, vectors, strict=True))
        ]
        got = fuse(xs, presence)
        want = PLAIN[activation](F.linear(torch.cat(replaced, -1), fuse.weight, fuse.bias))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        got_grads, want_grads = (torch.autograd.grad(y.sin().sum(), [*xs, *parameters]) for y in (got, want))
        for a, b in zip(got_grads, want_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_concat_fusion_replaces_for_any_leading_dims(lead: tuple[int, ...], either_backend: str) -> None:
    fuse = shuffled(mmk.nn.ConcatFusion(WIDTHS, 7, missing="learned"))
    xs = inputs(*lead)
    replaced = [fuse.missing_vectors[0].expand(*lead, 5), *xs[1:]]
    want = F.linear(torch.cat(replaced, -1), fuse.weight, fuse.bias)
    presence = torch.tensor([False, True, True])
    torch.testing.assert_close(fuse(xs, presence), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fuse(xs, presence.expand(*lead, 3)), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fuse(xs), F.linear(torch.cat(xs, -1), fuse.weight, fuse.bias))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_fusion_is_the_written_out_unit(gate: Any, bias: bool, either_backend: str) -> None:
    widths = (5, 6) if gate == "sigmoid" else WIDTHS
    fuse = shuffled(mmk.nn.GatedFusion(widths, 7, bias))
    assert fuse.gate == gate
    xs = inputs(9, widths=widths)
    biases = fuse.value_biases or [torch.zeros(7) for _ in widths]
    values = [torch.tanh(x @ w.T + b) for x, w, b in zip(xs, fuse.value_weights, biases, strict=True)]
    z = F.linear(torch.cat(xs, -1), fuse.gate_weight, fuse.gate_bias)
    if gate == "sigmoid":
        want = torch.sigmoid(z) * values[0] + (1 - torch.sigmoid(z)) * values[1]
    else:
        want = (z.view(9, 3, 7).softmax(1) * torch.stack(values, 1)).sum(1)
    got = fuse(xs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaves = [*xs, *fuse.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gated_fusion_leaves_absent_modalities_out(either_backend: str) -> None:
    fuse = shuffled(mmk.nn.GatedFusion((5, 6), 7))
    xs = inputs(9, widths=(5, 6))
    alone = torch.tanh(F.linear(xs[0], fuse.value_weights[0], fuse.value_biases[0]))
    presence = torch.tensor([True, False])
    torch.testing.assert_close(fuse(spoiled(xs, presence, math.nan), presence), alone)
    assert not fuse(xs, torch.zeros(9, 2, dtype=torch.bool)).any()
    y, gate = fuse(xs, presence, return_gate=True)
    torch.testing.assert_close(y, alone)
    assert gate.shape == (9, 2, 7) and (gate[:, 0] == 1).all() and not gate[:, 1].any()


MODULES: dict[str, Any] = {
    "ConcatFusion": lambda **o: mmk.nn.ConcatFusion(WIDTHS, 7, activation="gelu", missing="learned", **o),
    "GatedFusion": lambda **o: mmk.nn.GatedFusion(WIDTHS, 7, **o),
}


@pytest.mark.parametrize("module", MODULES)
def test_constructor_conventions(module: str) -> None:
    fuse = MODULES[module](device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in fuse.parameters())
    torch.manual_seed(0)
    first = MODULES[module]()
    torch.manual_seed(0)
    second = MODULES[module]()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    shuffled(first).reset_parameters()
    assert all(float(p.detach().abs().max()) <= 1 for p in first.parameters())
    second.load_state_dict(first.state_dict())
    assert "in_features=(5, 1, 6), out_features=7" in repr(first)


@pytest.mark.parametrize("module", MODULES)
def test_modules_compile_in_one_graph(module: str) -> None:
    fuse = shuffled(MODULES[module]())
    xs, presence = inputs(4), torch.rand(4, 3) > 0.3
    torch._dynamo.reset()
    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager")
    got, want = compiled(xs, presence), fuse(xs, presence)
    torch.testing.assert_close(got, want)
    leaves = flat([xs, list(fuse.parameters())])
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_constructor_arguments() -> None:
    with pytest.raises(ValueError, match=r"^ConcatFusion: missing: expected 'zeros' or 'learned'; got 'mean'"):
        mmk.nn.ConcatFusion(WIDTHS, 7, missing="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^GatedFusion: gate: expected 'softmax', or .*; got 'sigmoid' for 3"):
        mmk.nn.GatedFusion(WIDTHS, 7, gate="sigmoid")
