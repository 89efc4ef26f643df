"""varlen_cross_attention on every backend and instruction set: outputs and gradients against the float64 reference."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from environment import HERE
from fusion_cases import each_dtype, few_dtypes, leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op


def starts(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def make(
    dtype: torch.dtype = torch.float32,
    queries: Sequence[int] = (33, 20, 7),
    keys: Sequence[int] = (65, 3, 40),
    heads: int = 4,
    kv_heads: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    gain: float = 1.0,
) -> tuple[Any, ...]:
    """Packed query, key and value that require grad, and the members' starts and greatest lengths."""
    kv_heads = heads if kv_heads is None else kv_heads
    return (
        leaf(sum(queries), heads, dim, dtype=dtype, gain=gain),
        leaf(sum(keys), kv_heads, dim, dtype=dtype),
        leaf(sum(keys), kv_heads, dim if value_dim is None else value_dim, dtype=dtype),
        starts(queries),
        starts(keys),
        max(queries, default=0),
        max(keys, default=0),
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "three members": ({}, {}),
    "one member": (dict(queries=(50,), keys=(70,)), {}),
    "odd sizes": (dict(queries=(63, 1, 16), keys=(131, 77, 1), dim=19, value_dim=7), {}),
    "members without queries, without keys, without either": (dict(queries=(0, 9, 0, 30), keys=(5, 0, 0, 41)), {}),
    "only members without keys": (dict(queries=(4, 9), keys=(0, 0)), dict(return_lse=True)),
    "many small members": (dict(queries=(1, 2, 3, 0, 5) * 6, keys=(4, 1, 0, 2, 7) * 6, dim=8), {}),
    "several tiles of one member": (dict(queries=(12, 197), keys=(300, 150), heads=2, dim=64), {}),
    "grouped heads": (dict(kv_heads=2), {}),
    "one key head for all, lse": (dict(heads=3, kv_heads=1), dict(return_lse=True)),
    "causal": ({}, dict(is_causal=True)),
    "causal top left": ({}, dict(is_causal=True, causal_alignment="top_left")),
    "window": (dict(queries=(70, 9, 30), keys=(65, 80, 0)), dict(window=(9, 3), return_lse=True)),
    "softcap and scale": (dict(gain=3.0), dict(softcap=2.5, scale=-0.3)),
    "few queries": (dict(queries=(1, 2, 0, 3), keys=(300, 40, 7, 900), dim=32), {}),
    "decoding": (dict(queries=(1, 1, 1), keys=(700, 0, 33), kv_heads=2, dim=32), {}),
    "decoding, causal": (dict(queries=(2, 2), keys=(400, 33), dim=24), dict(is_causal=True, window=(50, -1))),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    sizes, options = CASES[case]
    inputs = make(dtype, **sizes)
    check_op(mmk.varlen_cross_attention, *inputs, backend=backend, **options)
    with torch.no_grad():  # few queries have a kernel of their own then
        check_op(mmk.varlen_cross_attention, *inputs, backend=backend, grad=False, **options)


@pytest.mark.parametrize("case", CASES)
@few_dtypes
def test_outputs_and_gradients_with_sinks(case: str, dtype: torch.dtype, backend: str) -> None:
    sizes, options = CASES[case]
    inputs = make(dtype, **sizes)
    for kind in (torch.float32, dtype):
        sinks = leaf(inputs[0].shape[1], dtype=kind, gain=2.0)
        check_op(
            mmk.varlen_cross_attention, *inputs, backend=backend, **{**options, "sinks": sinks, "return_lse": True}
        )
        with torch.no_grad():
            check_op(mmk.varlen_cross_attention, *inputs, backend=backend, grad=False, sinks=sinks, **options)


def test_a_row_with_its_sink_alone_gives_zeros_even_if_it_is_nan(backend: str) -> None:
    """The first queries of a member with fewer keys than queries, bottom right."""
    q, k, v, *sizes = make(queries=(9, 5), keys=(4, 7))
    q = q.detach().index_fill(0, torch.tensor([0, 3]), math.nan).requires_grad_()
    sinks = leaf(4)
    out, lse = mmk.varlen_cross_attention(q, k, v, *sizes, is_causal=True, sinks=sinks, return_lse=True)
    assert not out[:5].any()
    assert torch.equal(lse[:5], sinks.detach().expand(5, 4))
    cotangent = torch.ones_like(out).index_fill(0, torch.tensor([1]), math.nan)
    grads = torch.autograd.grad((out, lse), (q, k, v, sinks), (cotangent, torch.ones_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:5].any()


@few_dtypes
def test_each_member_is_cross_attention_bit_for_bit(dtype: torch.dtype, native_isa: str) -> None:
    queries, keys = (33, 0, 190, 20), (65, 7, 150, 301)
    q, k, v, *sizes = make(dtype, queries, keys, kv_heads=2)
    options: dict[str, Any] = dict(is_causal=True, causal_alignment="bottom_right", return_lse=True)
    out, lse = mmk.varlen_cross_attention(q, k, v, *sizes, **options)
    grads = torch.autograd.grad((out, lse), (q, k, v), (out.detach().cos(), lse.detach().sin().nan_to_num()))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    outs, lses = [], []
    for member in parts:
        o, s = mmk.cross_attention(*(x.transpose(0, 1)[None] for x in member), enable_gqa=True, **options)
        outs.append(o[0].transpose(0, 1))
        lses.append(s[0].T)
    joined = torch.cat(outs), torch.cat(lses)
    cotangents = (joined[0].detach().cos(), joined[1].detach().sin().nan_to_num())
    assert agree([out, lse, *grads], [*joined, *torch.autograd.grad(joined, (q, k, v), cotangents)])


def test_int64_starts_and_any_strides(backend: str) -> None:
    q, k, v, cu_q, cu_k, *longest = make()
    heads_outermost = q.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    packed = torch.cat([k, v], -1).detach()
    k, v = packed[..., :16].requires_grad_(), packed[..., 16:].requires_grad_()
    inputs = (heads_outermost, k, v, cu_q.long(), cu_k.long().repeat_interleave(2)[::2], *longest)
    check_op(mmk.varlen_cross_attention, *inputs, return_lse=True, backend=backend)
    out = mmk.varlen_cross_attention(*inputs)
    assert out.transpose(0, 1).is_contiguous()
    assert torch.autograd.grad(out.sum(), heads_outermost)[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@few_dtypes
def test_other_members_and_what_a_window_hides_never_leak(garbage: float, dtype: torch.dtype, backend: str) -> None:
    """Member 1 is garbage, and so are the keys of member 0 that no query of it sees."""
    results = []
    for filler in (0.0, garbage):
        torch.manual_seed(1)
        q, k, v, *sizes = make(dtype, queries=(20, 5), keys=(41, 9))
        with torch.no_grad():
            q[20:] = filler
            k[41:] = v[41:] = filler
            k[:18] = v[:18] = filler
        out, lse = mmk.varlen_cross_attention(q, k, v, *sizes, window=(3, 0), return_lse=True)
        grads = torch.autograd.grad((out[:20], lse[:20]), (q, k, v), (torch.ones_like(out[:20]), lse[:20].detach()))
        results.append([out[:20], lse[:20], *(g[:20] for g in grads)])
    assert agree(*results)
    assert all(x.isfinite().all() for x in results[0])


EMPTY: dict[str, dict[str, Any]] = {
    "no members": dict(queries=(), keys=()),
    "no queries": dict(queries=(0, 0), keys=(3, 5)),
    "no features": dict(dim=0, value_dim=8),
    "no value features": dict(value_dim=0),
    "no heads": dict(heads=0, kv_heads=1),
}


@pytest.mark.parametrize("empty", EMPTY)
@few_dtypes
def test_empty_sizes(empty: str, dtype: torch.dtype, backend: str) -> None:
    inputs = make(dtype, **EMPTY[empty])
    out, lse = check_op(mmk.varlen_cross_attention, *inputs, return_lse=True, backend=backend)
    assert out.shape == (*inputs[0].shape[:2], inputs[2].shape[2]) and lse.shape == out.shape[:2]


# --- what torch asks of every op --------------------------------------------------------------------------------------


def packed(*leaves: Tensor) -> Tensor:
    """Output and LSE as one tensor; every member takes as many rows as there are for it, whatever their number."""
    rows, columns = leaves[0].shape[0] // 3, leaves[1].shape[0] // 3
    cu_q, cu_k = torch.arange(4) * rows, torch.arange(4) * columns
    out, lse = mmk.varlen_cross_attention(*leaves, cu_q, cu_k, rows, columns, softcap=3.0, return_lse=True)
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


# --- jagged NestedTensors ---------------------------------------------------------------------------------------------


def jagged(lengths: Sequence[int], heads: int = 2, dim: int = 8) -> tuple[Tensor, list[Tensor]]:
    """(B, heads, rows, dim), made as models make it, and its members."""
    members = [leaf(n, heads, dim) for n in lengths]
    return torch.nested.as_nested_tensor(members, layout=torch.jagged).transpose(1, 2), members


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_the_drop_in_takes_jagged_tensors(is_causal: bool, backend: str) -> None:
    (q, qs), (k, ks), (v, vs) = jagged((4, 9, 1)), jagged((7, 3, 30)), jagged((7, 3, 30))
    k = torch.nested.nested_tensor_from_jagged(k.values(), v.offsets(), jagged_dim=2)
    out = mmk.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert out.is_nested and out.shape == q.shape and out.transpose(1, 2).is_contiguous()
    want = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in member), is_causal=is_causal)
        for member in zip(qs, ks, vs, strict=True)
    ]
    for got, expected in zip(out.unbind(), want, strict=True):
        torch.testing.assert_close(got, expected)
    leaves = [*qs, *ks, *vs]
    grads = torch.autograd.grad(out.values().sin().sum(), leaves)
    for got, expected in zip(grads, torch.autograd.grad(sum(x.sin().sum() for x in want), leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_drop_in_compiles_for_jagged_tensors() -> None:
    (q, qs), (k, ks) = jagged((4, 9, 1)), jagged((7, 3, 30))
    compiled = torch.compile(mmk.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    outs = [attend(q, k, k).values() for attend in (compiled, mmk.scaled_dot_product_attention)]
    assert agree(outs[:1], outs[1:])
    grads = [torch.autograd.grad(out.sin().sum(), [*qs, *ks]) for out in outs]
    assert agree(*grads)


def test_jagged_tensors_that_are_not_ours_to_serve_get_what_torch_gives() -> None:
    (q, _), (other, _) = jagged((4, 9)), jagged((4, 9), heads=3)
    with pytest.raises(Exception, match=r".") as ours:
        mmk.scaled_dot_product_attention(q, other, other)
    with pytest.raises(Exception, match=r".") as torchs:
        F.scaled_dot_product_attention(q, other, other)
    assert type(ours.value) is type(torchs.value)


# --- bad input --------------------------------------------------------------------------------------------------------

x, s, unsorted = torch.zeros(6, 4, 8), torch.tensor([0, 2, 6]), torch.tensor([0, 7, 6])
ok = (x, x, x, s, s, 4, 4)


def but(**changes: Any) -> tuple[Any, ...]:
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return tuple(changes.get(name, value) for name, value in zip(names, ok, strict=True))


BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "query: expected a torch.Tensor; got int", but(query=3), {}),
    (ValueError, "key: expected 3 dims (T, H, D); got shape (4, 8)", but(key=x[0]), {}),
    (TypeError, "query: expected dtype float32", but(query=x.int(), key=x.int(), value=x.int()), {}),
    (TypeError, "value: expected the dtype of query, torch.float32", but(value=x.half()), {}),
    (RuntimeError, f"key: expected the device of query, {HERE}; got meta", but(key=x.to("meta")), {}),
    (ValueError, "key: expected shape (Tk, Hkv, 8); got (6, 4, 7)", but(key=x[..., 1:]), {}),
    (ValueError, "value: expected shape (6, 4, Dv); got (5, 4, 8)", but(value=x[1:]), {}),
    (
        ValueError,
        "key: expected a number of heads that divides query's 4; got 3",
        but(key=x[:, 1:], value=x[:, 1:]),
        {},
    ),
    (TypeError, "cu_seqlens_q: expected dtype int32 or int64; got torch.float32", but(cu_seqlens_q=s.float()), {}),
    (ValueError, "cu_seqlens_q: expected shape (B + 1,); got (1, 3)", but(cu_seqlens_q=s[None]), {}),
    (
        ValueError,
        "cu_seqlens_k: expected shape (3,) as cu_seqlens_q; got (2,)",
        but(cu_seqlens_k=s[::2], max_seqlen_k=6),
        {},
    ),
    (ValueError, "cu_seqlens_q: expected starts from 0 to 6 in order; got [0, 7, 6]", but(cu_seqlens_q=unsorted), {}),
    (ValueError, "cu_seqlens_k: expected starts from 0 to 6 in order; got [0, 2, 5]", but(cu_seqlens_k=s - s // 6), {}),
    (ValueError, "max_seqlen_k: expected at least the longest member, 4; got 3", but(max_seqlen_k=3), {}),
    (TypeError, "max_seqlen_q: expected an int; got float", but(max_seqlen_q=4.0), {}),
    (ValueError, "causal_alignment: expected 'top_left' or 'bottom_right'; got 'x'", ok, {"causal_alignment": "x"}),
    (ValueError, "window: expected sizes ≥ 0, or -1 for unbounded; got (-2, 0)", ok, {"window": (-2, 0)}),
    (TypeError, "scale: expected a number; got str", ok, {"scale": "1"}),
    (ValueError, "softcap: expected a finite number ≥ 0; got -1.0", ok, {"softcap": -1.0}),
    (ValueError, "sinks: expected shape (4,), one for each head of query; got (3,)", ok, {"sinks": torch.zeros(3)}),
    (TypeError, "sinks: expected a floating dtype; got torch.int64", ok, {"sinks": torch.tensor([1, 2, 3, 4])}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^varlen_cross_attention: " + re.escape(message)):
        mmk.varlen_cross_attention(*inputs, **options)


def test_starts_that_nobody_checked_never_reach_beyond_the_rows(native_isa: str) -> None:
    compiled = torch.compile(mmk.varlen_cross_attention, fullgraph=True, backend="aot_eager")
    for bad in (but(cu_seqlens_q=unsorted), but(cu_seqlens_k=s * 2), but(max_seqlen_q=3)):
        with pytest.raises(ValueError, match=r"varlen_cross_attention: cu_seqlens_[qk]: expected starts from 0 to 6"):
            compiled(*bad)
