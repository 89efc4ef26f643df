"""The attention pools on every backend and instruction set, and what torch asks of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from environment import HERE
from fusion_cases import each_dtype, few_dtypes, flat, presence_patterns, spoiled
from pool_cases import POOLS, Sizes, sources
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits

each_pool = pytest.mark.parametrize("pool", POOLS)

SIZES = {
    "three modalities": Sizes(),
    "one modality": Sizes(modalities=1),
    "sixteen modalities, one row": Sizes(batch=1, modalities=16),
    "many modalities": Sizes(batch=5, modalities=37, width=3, hidden=2),
    "whole vectors": Sizes(batch=48, modalities=2, width=64, hidden=32, query=32),
    "several blocks": Sizes(batch=203, modalities=4, width=70, hidden=66, query=33),
    "one of each": Sizes(batch=7, modalities=2, width=1, hidden=1, query=1),
    "no rows": Sizes(batch=0),
    "no features": Sizes(width=0),
    "no hidden features": Sizes(hidden=0),
    "an empty query": Sizes(query=0),
}

# The additive kernels take few rows all at once, many modality by modality.
FEW_AND_MANY = Sizes(), Sizes(batch=33)


@pytest.mark.parametrize("sizes", SIZES)
@each_pool
@each_dtype
def test_outputs_and_gradients(pool: str, sizes: str, dtype: torch.dtype, backend: str) -> None:
    s = SIZES[sizes]
    function, make = POOLS[pool]
    for stacked, presence in ((False, None), (True, torch.rand(s.batch, s.modalities) > 0.4)):
        xs, parameters = sources(s, dtype, stacked), make(s, dtype)
        # Without features all energies are equal, and gradients of what they share are rounding alone.
        pooled, weights = check_op(function, xs, backend=backend, grad=s.width > 0, **parameters, presence=presence)
        assert pooled.shape == (s.batch, s.width)
        assert weights.shape[:2] == (s.batch, s.modalities)


@each_pool
@few_dtypes
def test_every_presence(pool: str, dtype: torch.dtype, backend: str) -> None:
    function, make = POOLS[pool]
    for s in FEW_AND_MANY:
        for i, presence in enumerate(presence_patterns(s.batch, s.modalities).values()):
            parameters = make(s, dtype)
            check_op(function, sources(s, dtype, i % 2 == 0), backend=backend, **parameters, presence=presence)


@each_pool
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_an_absent_modality_is_never_read(pool: str, garbage: float, backend: str) -> None:
    function, make = POOLS[pool]
    for s, dtype in itertools.product(FEW_AND_MANY, (torch.float32, torch.bfloat16)):
        xs, parameters = sources(s, dtype), make(s, dtype)
        for presence in presence_patterns(s.batch, s.modalities).values():
            results = []
            for filler in (0.0, garbage):
                leaves = spoiled(xs, presence, filler)
                outputs = function(leaves, **parameters, presence=presence)
                wanted = flat([leaves, *parameters.values()])
                results.append([*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), wanted)])
            clean, dirty = results
            assert same_bits(clean, dirty)
            assert all(x.isfinite().all() for x in clean)
            there = presence.expand(s.batch, s.modalities)
            pooled, weights, *grads = clean
            assert not pooled[~there.any(-1)].any()
            assert not weights[~there].any()
            for i in range(s.modalities):
                assert not grads[i][~there[:, i]].any()


@each_pool
def test_the_reference_is_the_written_out_formula_row_by_row(pool: str) -> None:
    function, make = POOLS[pool]
    s = Sizes()
    xs, p = [x.detach() for x in sources(s, torch.float64)], make(s, torch.float64)
    presence = torch.rand(s.batch, s.modalities) > 0.4
    presence[0], presence[1] = False, True
    pooled, weights = function(xs, **p, presence=presence)
    for row in range(s.batch):
        there = [i for i in range(s.modalities) if presence[row, i]]
        want, shares = torch.zeros(s.width).double(), torch.zeros_like(weights[row])
        if there:
            if "vector" in p:
                shared = p.get("bias", 0)
                if "query" in p:
                    shared = shared + p["query_weight"] @ p["query"][row]
                energies = [p["vector"] @ torch.tanh(p["weight"] @ xs[i][row] + shared) for i in there]
            elif "query" in p:
                product = p["query"][row] @ p["weight"] if "weight" in p else p["query"][row]
                energies = [p.get("scale", s.width**-0.5) * product @ xs[i][row] for i in there]
            else:
                act = getattr(torch.nn.functional, p["activation"])
                z = act(p["weight1"] @ sum(xs[i][row] for i in there) + p["bias1"])
                all_energies = (p["weight2"] @ z + p["bias2"]).view(s.modalities, s.width)
                energies = [all_energies[i] for i in there]
            total = sum(torch.exp(e) for e in energies)
            for i, e in zip(there, energies, strict=True):
                shares[i] = torch.exp(e) / total
                want = want + shares[i] * xs[i][row]
        torch.testing.assert_close(pooled[row], want)
        torch.testing.assert_close(weights[row], shares)


@each_pool
def test_large_energies_stay_finite(pool: str, backend: str) -> None:
    function, make = POOLS[pool]
    s = Sizes(hidden=24)
    parameters = {
        k: (v.detach() * 30).requires_grad_() if isinstance(v, Tensor) else v for k, v in make(s, torch.float32).items()
    }
    outputs = function(sources(s), **parameters)
    leaves = flat(list(parameters.values()))
    assert all(t.isfinite().all() for t in (*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)))


@each_pool
def test_a_gradient_of_one_output_alone(pool: str, backend: str) -> None:
    function, make = POOLS[pool]
    s = Sizes()
    xs, parameters = sources(s), make(s, torch.float32)
    leaves = flat([xs, *parameters.values()])
    for output in range(2):
        got = torch.autograd.grad(function(xs, **parameters)[output].sin().sum(), leaves)
        with mmk.use_backend("reference"):
            want = torch.autograd.grad(function(xs, **parameters)[output].sin().sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_split_attention_weighs_every_feature_by_itself(backend: str) -> None:
    s = Sizes()
    for pool, (function, make) in POOLS.items():
        _, weights = function(sources(s), **make(s, torch.float32))
        expected = (s.batch, s.modalities, s.width) if pool.startswith("split") else (s.batch, s.modalities)
        assert weights.shape == expected
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


x, w, v, q = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5), torch.zeros(4, 2)
qw, stack, meta = torch.zeros(5, 2), torch.zeros(4, 2, 3), torch.zeros(5, device="meta")
w2, b2 = torch.zeros(6, 5), torch.zeros(6)
additive_pool, multiplicative, split = (
    mmk.additive_attention_pool,
    mmk.multiplicative_attention_pool,
    mmk.split_attention_pool,
)
BAD: list[tuple[Any, type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (additive_pool, ValueError, r"xs: expected shape \(B, M, D\), or a list .*; got \(4, 3\)", (x, w, v), {}),
    (additive_pool, ValueError, r"xs: expected at least one modality; got \(4, 0, 3\)", (stack[:, :0], w, v), {}),
    (additive_pool, ValueError, r"xs: expected at least one tensor; got an empty list", ([], w, v), {}),
    (additive_pool, ValueError, r"xs\[0\]: expected shape \(B, D\); got \(4, 2, 3\)", ([stack], w, v), {}),
    (additive_pool, ValueError, r"xs\[1\]: expected shape \(4, 3\); got \(3, 3\)", ([x, x[:3]], w, v), {}),
    (additive_pool, TypeError, r"xs\[1\]: expected a torch.Tensor; got NoneType", ([x, None], w, v), {}),
    (additive_pool, TypeError, r"xs: expected a list of tensors; got int", (3, w, v), {}),
    (additive_pool, TypeError, r"xs: expected dtype float32.*; got torch.int64", (stack.long(), w, v), {}),
    (additive_pool, ValueError, r"weight: expected shape \(N, 3\); got \(5, 2\)", ([x], qw, v), {}),
    (additive_pool, TypeError, r"weight: expected the dtype .*; got torch.float64", ([x], w.double(), v), {}),
    (additive_pool, ValueError, r"vector: expected shape \(5,\); got \(4,\)", ([x], w, v[1:]), {}),
    (additive_pool, RuntimeError, rf"vector: .* {HERE}; got meta", ([x], w, meta), {}),
    (additive_pool, ValueError, r"bias: expected shape \(5,\); got \(4,\)", ([x], w, v), {"bias": v[1:]}),
    (additive_pool, ValueError, r"query_weight: expected a tensor, as query is", ([x], w, v), {"query": q}),
    (additive_pool, ValueError, r"query: expected a tensor, as query_weight", ([x], w, v), {"query_weight": qw}),
    (
        additive_pool,
        ValueError,
        r"query: expected shape \(4, Dq\); got \(3, 2\)",
        ([x], w, v),
        {"query": q[1:], "query_weight": qw},
    ),
    (
        additive_pool,
        ValueError,
        r"query_weight: expected shape \(5, 2\); got \(5, 3\)",
        ([x], w, v),
        {"query": q, "query_weight": w},
    ),
    (additive_pool, TypeError, r"presence: expected dtype torch.bool", (stack, w, v), {"presence": x}),
    (
        additive_pool,
        ValueError,
        r"presence: expected shape \(4, 2\) or \(2,\); got \(4, 3\)",
        (stack, w, v),
        {"presence": x > 0},
    ),
    (multiplicative, ValueError, r"query: expected shape \(4, 3\), as there is no weight; got \(4, 2\)", ([x], q), {}),
    (multiplicative, ValueError, r"query: expected shape \(4, Dq\); got \(4, 2, 3\)", ([x], stack), {}),
    (multiplicative, ValueError, r"weight: expected shape \(2, 3\); got \(5, 3\)", ([x], q), {"weight": w}),
    (multiplicative, TypeError, r"scale: expected a number; got str", ([x], x), {"scale": "1"}),
    (multiplicative, TypeError, r"query: expected the dtype .*; got torch.float16", ([x], x.half()), {}),
    (split, ValueError, r"weight1: expected shape \(N, 3\); got \(5, 2\)", ([x, x], qw, v, w2, b2), {}),
    (split, ValueError, r"bias1: expected shape \(5,\); got \(6,\)", ([x, x], w, b2, w2, b2), {}),
    (split, ValueError, r"weight2: expected shape \(6, 5\); got \(5, 3\)", ([x, x], w, v, w, b2), {}),
    (split, ValueError, r"weight2: expected shape \(9, 5\); got \(6, 5\)", ([x] * 3, w, v, w2, b2), {}),
    (split, ValueError, r"bias2: expected shape \(6,\); got \(5,\)", ([x, x], w, v, w2, v), {}),
    (split, TypeError, r"bias2: expected a torch.Tensor; got NoneType", ([x, x], w, v, w2, None), {}),
    (split, ValueError, r"activation: expected None or one of", ([x, x], w, v, w2, b2), {"activation": "softmax"}),
]


@pytest.mark.parametrize(("function", "error", "message", "inputs", "options"), BAD, ids=[b[2][:40] for b in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    function: Any, error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^{function.__name__}: " + message):
        function(*inputs, **options)
