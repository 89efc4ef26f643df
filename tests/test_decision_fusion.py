"""decision_fusion on every backend and instruction set, and its module."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import op_contract as contract
import pytest
import torch
from environment import HERE
from fusion_cases import each_dtype, few_dtypes, flat, presence_patterns, spoiled
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.decision_fusion import METHODS
from mmkernels.testing import check_op, same_bits

each_method = pytest.mark.parametrize("method", METHODS)

SIZES: dict[str, tuple[int, int, int]] = {
    "three classifiers": (9, 3, 37),
    "one": (4, 1, 10),
    "nine, whole vectors": (33, 9, 64),
    "many classes": (3, 2, 2500),
    "one class": (5, 2, 1),
    "no rows": (0, 2, 5),
    "no classes": (4, 2, 0),
}


def classifiers(
    rows: int, count: int, classes: int, dtype: torch.dtype = torch.float32, gain: float = 3.0, excluded: float = 0.0
) -> list[Tensor]:
    """Logits that require grad, a share of them −inf."""
    made = [(torch.randn(rows, classes) * gain).to(dtype) for _ in range(count)]
    return [x.masked_fill(torch.rand(x.shape) < excluded, -torch.inf).requires_grad_() for x in made]


def weights_of(rows: int | None, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count if rows is None else (rows, count)).to(dtype).requires_grad_()


def check(logits: list[Tensor], weights: Tensor | None, method: Any, backend: str, presence: Tensor | None) -> Tensor:
    return check_op(
        mmk.decision_fusion,
        logits,
        weights,
        method=method,
        presence=presence,
        backend=backend,
        grad=method != "vote",
    )[0]


@pytest.mark.parametrize("sizes", SIZES)
@each_method
@each_dtype
def test_probabilities_and_gradients(sizes: str, method: str, dtype: torch.dtype, backend: str) -> None:
    rows, count, classes = SIZES[sizes]
    for of_rows, presence in ((False, None), (True, torch.rand(rows, count) > 0.4), (None, None)):
        weights = None if of_rows is None else weights_of(rows if of_rows else None, count, dtype)
        check(classifiers(rows, count, classes, dtype), weights, method, backend, presence)


@each_method
@few_dtypes
def test_every_presence(method: str, dtype: torch.dtype, backend: str) -> None:
    for i, presence in enumerate(presence_patterns(9, 3).values()):
        weights = None if i % 2 else weights_of(9, 3, dtype)
        out = check(classifiers(9, 3, 20, dtype), weights, method, backend, presence)
        there = presence.expand(9, 3).any(-1)
        assert not out[~there].any()
        if weights is None:
            torch.testing.assert_close(out[there].float().sum(-1), torch.ones(int(there.sum())), rtol=1e-2, atol=1e-2)


@each_method
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_an_absent_modality_and_its_weight_are_never_read(method: Any, garbage: float, backend: str) -> None:
    presence = presence_patterns(9, 3)["per row"]
    logits, given = classifiers(9, 3, 21), weights_of(9, 3).detach()
    results = []
    for filler in (0.0, garbage):
        leaves = spoiled(logits, presence, filler)
        weights = given.masked_fill(~presence, filler).requires_grad_()
        out = mmk.decision_fusion(leaves, weights, method=method, presence=presence)
        wanted = [*leaves, weights]
        results.append([out.detach()] if method == "vote" else [out, *torch.autograd.grad(out.sin().sum(), wanted)])
    assert same_bits(*results)
    assert all(x.isfinite().all() for x in results[0])


@each_method
@few_dtypes
def test_excluded_classes_have_probability_and_gradient_0(method: Any, dtype: torch.dtype, backend: str) -> None:
    logits = classifiers(12, 3, 35, dtype, excluded=0.3)
    with torch.no_grad():
        logits[0][2] = -torch.inf  # counts as absent
        logits[1][3, 1:], logits[2][3, :1] = -torch.inf, -torch.inf  # "log" and "product" leave nothing
        weights = weights_of(12, 3, dtype)
        weights[4, 1] = 0
    out = check(logits, weights, method, backend, None)
    assert not out[torch.stack([x == -torch.inf for x in logits]).all(0)].any()
    if method == "vote":
        return
    out = mmk.decision_fusion(logits, weights, method=method)
    grads = torch.autograd.grad(out.float().sin().sum(), logits)
    assert all(not g[x == -torch.inf].any() for g, x in zip(grads, logits, strict=True))
    without = torch.ones(12, 3, dtype=torch.bool)
    without[2, 0] = False
    assert same_bits([out], [mmk.decision_fusion(logits, weights, method=method, presence=without)])


@each_method
def test_large_logits_stay_finite(method: Any, backend: str) -> None:
    for gain in (1e4, 1e-4):
        check(classifiers(9, 3, 50, gain=gain), weights_of(None, 3), method, backend, None)


def test_the_reference_is_the_written_out_formula() -> None:
    z = [x.detach().double() for x in classifiers(6, 3, 5)]
    p, w = [x.softmax(-1) for x in z], torch.tensor([0.2, 0.5, 0.3]).double()
    geometric = math.prod(x**wi for x, wi in zip(p, w, strict=True))
    product, most = p[0] * p[1] * p[2], torch.maximum(torch.maximum(p[0], p[1]), p[2])
    votes = sum(wi * (torch.arange(5) == x.argmax(-1, keepdim=True)) for x, wi in zip(p, w, strict=True))
    expected: dict[Any, Tensor] = {
        "mean": w[0] * p[0] + w[1] * p[1] + w[2] * p[2],
        "log": geometric / geometric.sum(-1, keepdim=True),
        "product": product / product.sum(-1, keepdim=True),
        "max": most / most.sum(-1, keepdim=True),
        "vote": votes,
    }
    for method, want in expected.items():
        torch.testing.assert_close(mmk.decision_fusion(z, w, method=method), want)
    presence = torch.tensor([True, False, True])
    got = mmk.decision_fusion(z, w, method="mean", presence=presence)
    torch.testing.assert_close(got, 0.4 * p[0] + 0.6 * p[2])
    torch.testing.assert_close(mmk.decision_fusion(z, presence=presence), (p[0] + p[2]) / 2)
    assert not mmk.decision_fusion([x.requires_grad_() for x in z], method="vote").requires_grad


def fused(method: Any) -> contract.Function:
    def function(*leaves: Tensor) -> Tensor:
        *logits, weights = leaves
        return mmk.decision_fusion(logits, weights, method=method)

    return function


def leaves_of(rows: int = 7) -> list[Tensor]:
    return [*classifiers(rows, 2, 19), weights_of(None, 2)]


x, y = torch.zeros(2, 3), torch.zeros(2)
BAD: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "logits: expected a list of tensors; got Tensor", x, {}),
    (ValueError, "logits: expected at least one tensor; got", [], {}),
    (ValueError, "logits[0]: expected shape (B, C); got (2,)", [y], {}),
    (TypeError, "logits[0]: expected dtype float32", [x.int()], {}),
    (TypeError, "logits[1]: expected the dtype of logits[0], torch.float32", [x, x.half()], {}),
    (ValueError, "logits[1]: expected shape (2, 3); got (2, 2)", [x, x[:, 1:]], {}),
    (ValueError, "weights: expected shape (2,) or (2, 2); got (3,)", [x, x], dict(weights=x[0])),
    (TypeError, "weights: expected the dtype of logits[0]", [x, x], dict(weights=y.double())),
    (TypeError, "weights: expected a torch.Tensor; got list", [x, x], dict(weights=[0.5, 0.5])),
    (RuntimeError, f"weights: expected the device of logits[0], {HERE}; got meta", [x, x], dict(weights=y.to("meta"))),
    (ValueError, "method: expected one of mean, log, product, max, vote; got 'min'", [x], dict(method="min")),
    (TypeError, "method: expected one of mean, log, product, max, vote; got NoneType", [x], dict(method=None)),
    (TypeError, "presence: expected dtype torch.bool", [x, x], dict(presence=y)),
    (ValueError, "presence: expected shape (2, 1) or (1,)", [x], dict(presence=x > 0)),
]


@pytest.mark.parametrize(("error", "message", "logits", "options"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, logits: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^decision_fusion: " + re.escape(message)):
        mmk.decision_fusion(logits, **options)


# --- the module -------------------------------------------------------------------------------------------------------


@each_method
def test_the_module_is_the_op_and_its_shares_sum_to_1(method: Any) -> None:
    logits, presence = [x.detach() for x in classifiers(9, 3, 8)], presence_patterns(9, 3)["per row"]
    fuse = mmk.nn.DecisionFusion(3, method=method, weights=(0.5, 0.3, 0.2))
    probabilities, shares = fuse(logits, presence)
    weights = torch.tensor([0.5, 0.3, 0.2])
    assert same_bits([probabilities], [mmk.decision_fusion(logits, weights, method=method, presence=presence)])
    torch.testing.assert_close(shares.sum(-1), presence.any(-1).float())
    assert not shares[~presence].any()


def test_shares_are_each_modalitys_part_of_the_class_that_won() -> None:
    logits = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    p = torch.stack([x.softmax(-1)[0] for x in logits])
    for method, expected in {
        "mean": p[:, 0] / p[:, 0].sum(),
        "max": torch.tensor([1.0, 0.0]),
        "vote": torch.tensor([1.0, 0.0]),
    }.items():
        _, shares = mmk.nn.DecisionFusion(2, method=method)(logits)  # type: ignore[arg-type]
        torch.testing.assert_close(shares[0], expected)


def test_learnable_weights_begin_as_given_and_learn() -> None:
    fuse = mmk.nn.DecisionFusion(3, learnable=True, weights=(3.0, 2.0, 1.0), dtype=torch.float64)
    logits = [x.detach().double() for x in classifiers(9, 3, 8)]
    out, _ = fuse(logits)
    expected = mmk.decision_fusion(logits, torch.tensor([3.0, 2.0, 1.0]).double() / 6)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    out[:, 0].sum().backward()
    assert fuse.weight is not None and fuse.weight.grad is not None and fuse.weight.grad.abs().sum() > 0
    again = copy.deepcopy(fuse)
    again.load_state_dict(fuse.state_dict())
    assert len(flat(list(fuse.state_dict().values()))) == 1
    assert len(mmk.nn.DecisionFusion(3).state_dict()) == 0


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("num_modalities: expected a size ≥ 1; got 0", dict(num_modalities=0)),
        ("method: expected one of", dict(method="min")),
        ("weights: expected 2 numbers", dict(weights=(1.0,))),
        ("weights: expected finite numbers > 0", dict(weights=(1.0, 0.0), learnable=True)),
        ("weights: expected finite numbers > 0", dict(weights=(1.0, math.nan), learnable=True)),
        ("learnable: expected False for the method 'max'", dict(method="max", learnable=True)),
    ],
)
def test_constructors_say_what_is_wrong(message: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^DecisionFusion: " + re.escape(message)):
        mmk.nn.DecisionFusion(**{"num_modalities": 2, **options})


@each_method
def test_another_number_of_modalities_raises(method: Any) -> None:
    fuse = mmk.nn.DecisionFusion(3, method=method)
    with pytest.raises(ValueError, match=r"^DecisionFusion: logits: expected 3 modalities; got 2"):
        fuse([torch.randn(4, 5)] * 2)


@pytest.mark.parametrize(("weights", "message"), [("ab", "weights: expected a list of"), ([1, "b"], r"weights\[1\]: ")])
def test_weights_of_the_module_are_numbers(weights: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^DecisionFusion: {message}"):
        mmk.nn.DecisionFusion(2, weights=weights)
