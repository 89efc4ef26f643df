"""The attention pools on every backend and instruction set, and what torch asks of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import op_contract as contract
import pytest
import torch
from environment import DEVICE, HERE
from fusion_cases import LAYOUTS, each_dtype, few_dtypes, flat, presence_patterns, spoiled
from pool_cases import POOLS, Sizes, call, sources
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.additive_attention_pool import reference as additive_reference
from mmkernels.ops.additive_attention_pool.op import additive_attention_pool_op
from mmkernels.ops.multiplicative_attention_pool import reference as multiplicative_reference
from mmkernels.ops.multiplicative_attention_pool.op import multiplicative_attention_pool_op
from mmkernels.ops.split_attention_pool import reference as split_reference
from mmkernels.ops.split_attention_pool.op import split_attention_pool_op
from mmkernels.testing import check_op, same_bits

each_pool = pytest.mark.parametrize("pool", POOLS)
each_arrangement = pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])

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


@pytest.mark.parametrize("layout", LAYOUTS)
@each_pool
def test_any_strides(pool: str, layout: str, backend: str) -> None:
    arrange = LAYOUTS[layout]
    function, make = POOLS[pool]
    for batch, dtype in itertools.product((9, 33), (torch.float32, torch.bfloat16)):
        s = Sizes(batch, width=16, hidden=6)
        xs = [arrange(x.detach()).requires_grad_() for x in sources(s, dtype)]
        parameters = {
            k: arrange(v.detach()).requires_grad_() if isinstance(v, Tensor) and v.dim() == 2 else v
            for k, v in make(s, dtype).items()
        }
        check_op(function, xs, backend=backend, **parameters)


@each_pool
def test_a_stacked_tensor_of_any_strides(pool: str, backend: str) -> None:
    function, make = POOLS[pool]
    s = Sizes()
    x = sources(s, stacked=True)
    assert isinstance(x, Tensor)
    x = x.detach()
    for arranged in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], 2)[:, :, : s.width],
        x[:1].expand_as(x),
        x[:, :1].expand_as(x),
    ):
        presence = torch.rand(s.batch, s.modalities) > 0.3
        check_op(function, arranged.requires_grad_(), backend=backend, **make(s, x.dtype), presence=presence)


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
@each_arrangement
def test_the_kernels_in_memory_threads_and_partial_gradients(pool: str, stacked: bool, native_isa: str) -> None:
    for s in (Sizes(batch=3), Sizes(width=0), Sizes(batch=230, modalities=4, width=37, hidden=40)):
        presence = None if s.batch < 10 else torch.rand(s.batch, s.modalities) > 0.3
        function, leaves = call(pool, s, stacked=stacked, presence=presence)
        contract.check_every_element_is_written(function, leaves)
        contract.check_threads_and_runs_agree(function, leaves)
        contract.check_each_gradient_alone(function, leaves)
        contract.check_strides(function, leaves)


@each_pool
@each_arrangement
def test_what_torch_asks(pool: str, stacked: bool, either_backend: str) -> None:
    s = Sizes(batch=4)
    presence = torch.tensor([True, False, True])
    function, leaves = call(pool, s, stacked=stacked, presence=presence)
    contract.check_func(function, leaves)
    contract.check_autocast(function, leaves)
    contract.check_checkpoint(function, leaves)
    torch._dynamo.reset()  # all pools are one callable here, and its recompilations are counted
    contract.check_compile(function, lambda batch: call(pool, replace(s, batch=batch), stacked=stacked)[1])


@each_pool
def test_export(pool: str, either_backend: str) -> None:
    function, leaves = call(pool, Sizes(), stacked=True)

    def make(batch: int) -> list[Tensor]:
        return [torch.randn(batch, *x.shape[1:]) if i in batched else x for i, x in enumerate(leaves)]

    batched = [i for i, x in enumerate(leaves) if x.dim() > 1 and x.shape[0] == Sizes().batch]
    order = [*batched, *(i for i in range(len(leaves)) if i not in batched)]

    def reordered(*x: Tensor) -> Tensor:
        return function(*(x[order.index(i)] for i in range(len(leaves))))

    contract.check_export(reordered, lambda batch: [make(batch)[i] for i in order], len(batched))


OPS = {
    "additive with query": additive_attention_pool_op,
    "bilinear": multiplicative_attention_pool_op,
    "split relu": split_attention_pool_op,
    "split gelu": split_attention_pool_op,
}


@pytest.mark.parametrize("pool", OPS)
@each_arrangement
def test_opcheck(pool: str, stacked: bool, either_backend: str) -> None:
    s = Sizes(batch=4)
    presence = torch.rand(s.batch, s.modalities) > 0.4
    op, make = OPS[pool], POOLS[pool][1]
    xs = sources(s, stacked=stacked)
    parameters = list(make(s, torch.float32).values())
    if pool == "additive with query":
        parameters = [parameters[i] for i in range(5)]
    arguments = ([xs] if isinstance(xs, Tensor) else xs, *parameters, presence)
    torch.library.opcheck(op.forward.overload, (*arguments, True))
    torch.library.opcheck(op.forward.overload, (*arguments, False))
    results = [t.detach() for t in op.forward(*arguments, True)]
    grads = [torch.randn_like(t) for t in results[:2]]
    leaves = flat(list(arguments))
    needed = [t.is_floating_point() and i % 3 != 1 for i, t in enumerate(leaves)]
    torch.library.opcheck(op.backward.overload, (grads, *arguments, results, needed))


@each_pool
@each_arrangement
def test_second_derivatives(pool: str, stacked: bool) -> None:
    s = Sizes(batch=2, modalities=2, width=3, hidden=2, query=2)
    presence = torch.tensor([[True, True], [False, True]])
    contract.check_second_order(*call(pool, s, stacked=stacked, presence=presence))


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


def test_example_inputs_run(backend: str) -> None:
    assert mmk.additive_attention_pool(**additive_reference.example_inputs(torch.float16, DEVICE))[0].shape == (8, 64)
    example = multiplicative_reference.example_inputs(torch.bfloat16, DEVICE)
    assert mmk.multiplicative_attention_pool(**example)[0].shape == (8, 64)
    assert mmk.split_attention_pool(**split_reference.example_inputs(device=DEVICE))[1].shape == (8, 2, 64)


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
