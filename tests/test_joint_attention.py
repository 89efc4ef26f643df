"""joint_attention on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from environment import DEVICE, HERE
from fusion_cases import allocations, each_dtype, few_dtypes, leaf
from op_contract import (
    check_second_order,
)
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.joint_attention import op as joint_attention_op
from mmkernels.testing import check_op, same_bits

Streams = list[Tensor]


def make(
    dtype: torch.dtype = torch.float32,
    queries: Sequence[int] = (33, 20),
    keys: Sequence[int] | None = None,
    batch: int = 2,
    heads: int = 3,
    dim: int = 16,
    value_dim: int | None = None,
    gain: float = 1.0,
    key_heads: int | None = None,
) -> tuple[Streams, Streams, Streams]:
    """Random streams that require grad; as many keys as queries unless given."""
    key_heads = heads if key_heads is None else key_heads
    keys = queries if keys is None else keys
    value_dim = dim if value_dim is None else value_dim
    return (
        [leaf(batch, heads, n, dim, dtype=dtype, gain=gain) for n in queries],
        [leaf(batch, key_heads, n, dim, dtype=dtype) for n in keys],
        [leaf(batch, key_heads, n, value_dim, dtype=dtype) for n in keys],
    )


def outputs(*args: Any, **options: Any) -> Streams:
    """The outputs, then the LSEs if they are asked for."""
    result = mmk.joint_attention(*args, **options)
    return [*result[0], *result[1]] if isinstance(result, tuple) else result


def bias(*shape: int, forbidden: Sequence[tuple[int, ...]] = (), gain: float = 1.0) -> Callable[..., dict[str, Any]]:
    def options(dtype: torch.dtype) -> dict[str, Any]:
        entries = (torch.randn(shape) * gain).to(dtype)
        for pair in forbidden:
            entries[(..., *pair)] = -torch.inf
        return {"stream_bias": entries.requires_grad_()}

    return options


def lengths(*values: tuple[int, ...] | None, **options: Any) -> dict[str, Any]:
    return {"key_lengths": [None if x is None else torch.tensor(x) for x in values], **options}


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "two streams": ({}, {}),
    "three streams, odd sizes": (dict(queries=(7, 63, 1), dim=19, value_dim=7), {}),
    "eight streams": (dict(queries=(3, 1, 17, 2, 5, 9, 4, 33), dim=8), {}),
    "one query stream over three sources": (dict(queries=(40,), keys=(11, 50, 3)), {}),
    "three query streams over one source": (dict(queries=(5, 50, 18), keys=(70,)), {}),
    "streams without tokens": (dict(queries=(0, 20, 0), keys=(0, 33, 0)), {}),
    "several tiles of each": (dict(batch=1, heads=2, queries=(130, 197), keys=(230, 150), dim=64), {}),
    "values wider than keys": (dict(dim=8, value_dim=80), {}),
    "key lengths": ({}, lengths((33, 17), (0, 20))),
    "key lengths of some": (dict(queries=(21,), keys=(9, 40, 12)), lengths(None, (40, 3), None)),
    "padded to nothing": (dict(queries=(21, 3)), lengths((0, 1), (0, 0), return_lse=True)),
    "bias": ({}, bias(2, 2)),
    "bias per head": (dict(queries=(33,), keys=(12, 40, 7)), bias(3, 1, 3)),
    "large bias": ({}, bias(2, 2, gain=30.0)),
    "bias that forbids": ({}, bias(2, 2, forbidden=[(0, 1)])),
    "bias that forbids a stream everything": (dict(queries=(33, 20, 50)), bias(3, 3, forbidden=[(1,)])),
    "bias over one source": (dict(queries=(40, 3), keys=(50,)), bias(2, 1)),
    "bias with softcap and negative scale": (
        dict(gain=3.0),
        lambda dtype: {**bias(3, 2, 2, forbidden=[(1, 0)])(dtype), "softcap": 2.5, "scale": -0.4},
    ),
    "bias with lengths and lse": (
        {},
        lambda dtype: {**bias(2, 2, forbidden=[(1, 1)])(dtype), **lengths(None, (20, 7)), "return_lse": True},
    ),
    "lse": ({}, dict(return_lse=True)),
    "scale and softcap": (dict(gain=2.0), dict(scale=0.7, softcap=3.0)),
    "few queries, many keys": (dict(queries=(1, 2), keys=(700, 500), dim=32), {}),
    "few queries with bias and lengths": (
        dict(queries=(2, 1), keys=(300, 0, 400), dim=24),
        lambda dtype: {**bias(3, 2, 3, forbidden=[(0, 2)])(dtype), **lengths((290, 4), None, None)},
    ),
    "16 queries, many keys": (dict(batch=1, queries=(16,), keys=(1000, 400), dim=32), bias(1, 2)),
    "large logits": (dict(gain=40.0), {}),
    "grouped heads": (dict(heads=6, key_heads=2), dict(enable_gqa=True, return_lse=True)),
    "grouped heads with bias and lengths": (
        dict(heads=4, key_heads=1, queries=(21, 3), keys=(9, 40)),
        lambda dtype: {**bias(4, 2, 2, forbidden=[(0, 1)])(dtype), **lengths((9, 2), None), "enable_gqa": True},
    ),
    "grouped heads, few queries": (dict(heads=4, key_heads=2, queries=(1, 2), keys=(300, 70)), dict(enable_gqa=True)),
    "dropout": ({}, dict(dropout_p=0.3)),
    "dropout, odd streams": (dict(queries=(7, 63, 1), keys=(5, 0, 130, 2), dim=19), dict(dropout_p=0.5)),
    "dropout, one row": (dict(queries=(1,), keys=(33, 70)), dict(dropout_p=0.4)),
    "dropout of everything": ({}, dict(dropout_p=1.0)),
    "dropout with everything else": (
        dict(heads=6, key_heads=2),
        lambda dtype: {
            **bias(6, 2, 2, forbidden=[(1, 0)])(dtype),
            **lengths(None, (20, 7)),
            **dict(enable_gqa=True, dropout_p=0.2, softcap=3.0, return_lse=True),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    sizes, options = CASES[case]
    factor = 3.0 if "large" in case else 2.0  # the rounding of large scores enters the exponent, whoever adds them up
    options = options(dtype) if callable(options) else options
    if backend == "triton" and options.get("dropout_p") and len(sizes.get("queries", (1, 1))) > 1:
        pytest.skip("Triton's kernels count dropout within a stream")
    check_op(outputs, *make(dtype, **sizes), backend=backend, factor=factor, **options)


@pytest.mark.parametrize("grouped", [False, True], ids=["", "grouped heads"])
def test_dropout_is_that_of_the_concatenation(grouped: bool, either_backend: str) -> None:
    streams = make(queries=(7, 63, 1), keys=(5, 0, 130, 2), heads=4, key_heads=2 if grouped else 4)
    torch.manual_seed(5)
    outs = mmk.joint_attention(*streams, dropout_p=0.4, enable_gqa=grouped)
    torch.manual_seed(5)
    joined = (torch.cat(x, 2) for x in streams)
    want = mmk.cross_attention(*joined, dropout_p=0.4, enable_gqa=grouped)
    torch.testing.assert_close(torch.cat(outs, 2), want)
    assert not agree([torch.cat(mmk.joint_attention(*streams, dropout_p=0.4, enable_gqa=grouped), 2)], [want])


def test_dropout_and_grouped_heads_inside_torch(either_backend: str) -> None:
    queries, keys, values = make(heads=4, key_heads=2, queries=(5, 3), keys=(4, 6))
    leaves = [*queries, *keys, *values]

    def call(*leaves: Tensor, p: float = 0.0) -> Tensor:
        parts = (list(leaves[i : i + 2]) for i in (0, 2, 4))
        return torch.cat(mmk.joint_attention(*parts, enable_gqa=True, dropout_p=p), 2)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert agree([compiled(*leaves)], [call(*leaves)])
    assert compiled(*leaves, p=0.5).shape == call(*leaves).shape


def test_second_derivatives_of_grouped_heads() -> None:
    queries, keys, values = make(heads=2, key_heads=1, batch=1, queries=(2, 1), keys=(2, 1), dim=3)
    check_second_order(
        lambda *x: torch.cat(mmk.joint_attention(x[:2], x[2:4], x[4:], enable_gqa=True), 2), [*queries, *keys, *values]
    )


def test_what_gpus_cannot_drop_says_why() -> None:
    queries, keys, values = make()
    rest = ([], [], None, None, 0.0, 0.1, None, False)
    supports = joint_attention_op._triton_supports, joint_attention_op._cuda_supports
    reasons = [f(joint_attention_op.Arguments(queries, keys, values, *rest)) for f in supports]
    assert reasons == [
        "its kernels count dropout within a stream, not along all of them",
        "its kernel has no softcap or dropout",
    ]
    assert supports[0](joint_attention_op.Arguments(queries[:1], keys[:1], values[:1], *rest)) is None


def test_a_float32_bias_goes_with_half_precision(backend: str) -> None:
    options = bias(2, 2, forbidden=[(1, 0)])(torch.float32)
    check_op(outputs, *make(torch.bfloat16), backend=backend, return_lse=True, **options)


@few_dtypes
def test_one_stream_is_cross_attention_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (streams[0] for streams in make(dtype, queries=(50,), keys=(70,)))
    grad = torch.randn(q.shape).to(dtype)
    joint, cross = mmk.joint_attention([q], [k], [v])[0], mmk.cross_attention(q, k, v)
    pulled = [torch.autograd.grad(out, (q, k, v), grad) for out in (joint, cross)]
    if backend != "reference":
        assert agree([joint, *pulled[0]], [cross, *pulled[1]])
    else:
        torch.testing.assert_close([joint, *pulled[0]], [cross, *pulled[1]])


def test_it_is_the_attention_of_the_concatenation(backend: str) -> None:
    queries, keys, values = make(queries=(7, 20, 5), keys=(9, 30))
    whole = F.scaled_dot_product_attention(*(torch.cat(x, 2) for x in (queries, keys, values)))
    torch.testing.assert_close(torch.cat(mmk.joint_attention(queries, keys, values), 2), whole)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [(33, 20), (2, 1)], ids=str)
@few_dtypes
def test_padding_and_forbidden_streams_never_leak(
    queries: tuple[int, ...], garbage: float, dtype: torch.dtype, backend: str
) -> None:
    """Stream 2 is forbidden to all, and stream 1 of the queries, all garbage, attends to nothing."""
    clean = [[x.detach() for x in streams] for streams in make(dtype, queries=queries, keys=(40, 35, 9))]
    padding = torch.arange(40) >= torch.tensor([31, 0])[:, None]  # [B, L]
    entries = torch.tensor([[0.5, -1.0, -torch.inf], [-torch.inf] * 3])

    def run(filler: float) -> list[Tensor]:
        q, k, v = ([x.clone() for x in streams] for streams in clean)
        q[1].fill_(filler)
        for x in (k, v):
            x[0] = x[0].masked_fill(padding[:, None, :, None], filler)
            x[2].fill_(filler)
        leaves = [x.requires_grad_() for x in (*q, *k, *v, entries.clone())]
        options: dict[str, Any] = {"key_lengths": [torch.tensor([31, 0]), None, None], "stream_bias": leaves[-1]}
        outs, lses = mmk.joint_attention(q, k, v, return_lse=True, **options)
        with torch.no_grad():
            few = mmk.joint_attention(q, k, v, **options)
        results = [outs[0], outs[1], lses[0]]
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
        return [*results, *few, *grads, lses[1]]

    results, spoiled = run(0.0), run(garbage)
    assert same_bits(results, spoiled)
    assert all(x.isfinite().all() for x in results[:-1])
    assert not results[1].any() and (results[-1] == -torch.inf).all()


@few_dtypes
def test_a_bad_key_poisons_the_streams_that_may_attend_to_it(dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(dtype)
    with torch.no_grad():
        k[1][:, :, 4, 2] = torch.inf
        v[1][:, :, 7] = torch.nan
    entries = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    outs = mmk.joint_attention(q, k, v, stream_bias=entries)
    assert outs[0].isfinite().all() and outs[1].isnan().all()
    grad = torch.autograd.grad(outs[0].float().sum(), q, allow_unused=True, materialize_grads=True)
    assert grad[0].isfinite().all()


def test_outputs_and_gradients_take_the_memory_order_of_their_stream(backend: str) -> None:
    queries, keys, values = make(queries=(33, 20), value_dim=24)
    queries[1] = queries[1].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    keys[0] = keys[0].detach().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).requires_grad_()
    outs = mmk.joint_attention(queries, keys, values)
    assert outs[0].is_contiguous() and outs[1].transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad([x.sum() for x in outs], [*queries, *keys])
    assert grads[0].is_contiguous() and grads[1].transpose(1, 2).is_contiguous()
    assert grads[2].permute(2, 0, 1, 3).is_contiguous()


def test_nothing_as_large_as_a_concatenation_is_allocated(native_isa: str) -> None:
    queries, keys, values = make(queries=(300, 300, 300), dim=32)
    stream = queries[0].nbytes

    def train() -> None:
        torch.autograd.grad([o.sum() for o in mmk.joint_attention(queries, keys, values)], [*queries, *keys, *values])

    assert max(allocations(train)) <= stream


EMPTY: dict[str, dict[str, Any]] = {
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no queries": dict(queries=(0, 0), keys=(5, 3)),
    "no keys": dict(queries=(5, 3), keys=(0, 0)),
    "no features": dict(dim=0, value_dim=8),
    "no value features": dict(value_dim=0),
}


@pytest.mark.parametrize("empty", EMPTY)
@few_dtypes
def test_empty_sizes(empty: str, dtype: torch.dtype, backend: str) -> None:
    queries, keys, values = make(dtype, **EMPTY[empty])
    options = bias(2, 2)(dtype)
    results = check_op(outputs, queries, keys, values, return_lse=True, backend=backend, **options)
    assert [x.shape for x in results[:2]] == [(*q.shape[:3], values[0].shape[3]) for q in queries]
    if empty == "no keys":
        assert not any(x.any() for x in results[:2]) and all((x == -torch.inf).all() for x in results[2:])


# --- what torch asks of every op --------------------------------------------------------------------------------------


def joined(*leaves: Tensor) -> Tensor:
    """Two streams and a bias that forbids one pair, as one tensor."""
    q, k, v = leaves[0:2], leaves[2:4], leaves[4:6]
    forbidden = torch.tensor([[False, True], [False, False]])
    outs = mmk.joint_attention(q, k, v, stream_bias=leaves[6].masked_fill(forbidden, -torch.inf), softcap=3.0)
    return torch.cat([o.flatten(1) for o in outs], 1)


def test_autocast_casts_the_streams_as_torch_casts_them(either_backend: str) -> None:
    queries, keys, values = make()
    entries = torch.randn(2, 2)
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = mmk.joint_attention(queries, keys, values, stream_bias=entries)
    half = [[x.bfloat16() for x in streams] for streams in (queries, keys, values)]
    assert agree(outs, mmk.joint_attention(*half, stream_bias=entries))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(outs[0].sum(), queries))


def test_an_output_that_nobody_uses_costs_no_more_than_zeros(either_backend: str) -> None:
    queries, keys, values = make()
    leaves = [*queries, *keys, *values]
    outs, lses = mmk.joint_attention(queries, keys, values, return_lse=True)
    some = torch.autograd.grad(outs[1].sum() + lses[0].sum(), leaves)
    outs, lses = mmk.joint_attention(queries, keys, values, return_lse=True)
    zeros = [torch.zeros_like(outs[0]), torch.ones_like(outs[1]), torch.ones_like(lses[0]), torch.zeros_like(lses[1])]
    assert agree(some, torch.autograd.grad([*outs, *lses], leaves, zeros))


def test_more_streams_than_the_cpus_kernels_take() -> None:
    streams = make(queries=(2,) * 9)
    if DEVICE == "cpu":
        assert mmk.explain(mmk.joint_attention, *streams).backend == "reference"
    torch.testing.assert_close(
        torch.cat(mmk.joint_attention(*streams), 2), F.scaled_dot_product_attention(*(torch.cat(x, 2) for x in streams))
    )


# --- bad input --------------------------------------------------------------------------------------------------------

x, y = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
one = ([x], [x], [x])
BAD: list[tuple[type[Exception], str, tuple[Any, Any, Any], dict[str, Any]]] = [
    (TypeError, "queries: expected a list of tensors; got Tensor", (x, [x], [x]), {}),
    (ValueError, "keys: expected at least one tensor; got", ([x], [], []), {}),
    (ValueError, "values: expected 2 tensors as in keys; got 1", ([x], [x, y], [x]), {}),
    (TypeError, "keys[1]: expected a torch.Tensor; got int", ([x], [x, 3], [x, x]), {}),
    (ValueError, "queries[1]: expected 4 dims (B, H, L, D); got shape (4, 3, 8)", ([x, x[0]], [x], [x]), {}),
    (TypeError, "queries[0]: expected dtype float32", ([x.int()], [x.int()], [x.int()]), {}),
    (TypeError, "keys[0]: expected the dtype of queries[0], torch.float32", ([x], [x.half()], [x]), {}),
    (RuntimeError, f"values[0]: expected the device of queries[0], {HERE}; got meta", ([x], [x], [x.to("meta")]), {}),
    (ValueError, "queries[1]: expected shape (2, 4, L, 8); got (2, 4, 3, 7)", ([x, x[..., 1:]], [x], [x]), {}),
    (ValueError, "keys[0]: expected shape (2, 4, L, 8); got (1, 4, 3, 8)", ([x], [x[:1]], [x]), {}),
    (ValueError, "values[1]: expected shape (2, 4, 5, 8); got (2, 4, 3, 8)", ([x], [x, y], [x, x]), {}),
    (TypeError, "key_lengths: expected a list", one, {"key_lengths": torch.tensor([1, 2])}),
    (ValueError, "key_lengths: expected 1 entries, one per key stream; got 2", one, {"key_lengths": [None] * 2}),
    (ValueError, "key_lengths[0]: expected values in [0, 3]; got [1, 4]", one, {"key_lengths": [torch.tensor([1, 4])]}),
    (TypeError, "key_lengths[0]: expected dtype int32 or int64", one, {"key_lengths": [torch.zeros(2)]}),
    (TypeError, "stream_bias: expected a torch.Tensor; got float", one, {"stream_bias": 1.0}),
    (TypeError, "stream_bias: expected dtype torch.float32", one, {"stream_bias": torch.zeros(1, 1).half()}),
    (
        ValueError,
        "stream_bias: expected shape (1, 2) or (4, 1, 2); got (2, 1)",
        ([x], [x, y], [x, y]),
        {"stream_bias": torch.zeros(2, 1)},
    ),
    (TypeError, "scale: expected a number; got str", one, {"scale": "1"}),
    (ValueError, "softcap: expected a finite number ≥ 0; got -1.0", one, {"softcap": -1.0}),
    (ValueError, "dropout_p: expected a probability in [0, 1]; got 1.5", one, {"dropout_p": 1.5}),
    (ValueError, "keys[0]: expected shape (2, 4, L, 8); got (2, 2, 3, 8)", ([x], [x[:, :2]], [x[:, :2]]), {}),
    (
        ValueError,
        "keys[0]: expected a number of heads that divides the queries' 4; got 3",
        ([x], [x[:, :3]], [x[:, :3]]),
        {"enable_gqa": True},
    ),
    (
        ValueError,
        "keys[1]: expected shape (2, 2, L, 8); got (2, 4, 3, 8)",
        ([x], [x[:, :2], x], [x[:, :2], x]),
        {"enable_gqa": True},
    ),
]


@pytest.mark.parametrize(("error", "message", "streams", "options"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, streams: tuple[Any, Any, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^joint_attention: " + re.escape(message)):
        mmk.joint_attention(*streams, **options)
