"""cross_attention on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import assert_close_to_oracle, check_op, poisoned_memory, same_bits

DTYPES = [pytest.param(t, id=str(t)[6:]) for t in (torch.float32, torch.bfloat16, torch.float16)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
few_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2])


def make(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    query_len: int = 33,
    key_len: int = 65,
    dim: int = 16,
    value_dim: int | None = None,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value that require grad."""
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = dim if value_dim is None else value_dim
    shapes = (
        (batch, heads, query_len, dim),
        (batch, kv_heads, key_len, dim),
        (batch, kv_heads, key_len, value_dim),
    )
    q, k, v = (torch.randn(shape) for shape in shapes)
    q, k, v = ((x * g).to(dtype).requires_grad_() for x, g in ((q, gain), (k, 1.0), (v, 1.0)))
    return q, k, v


# What each case sets: shapes for `make`, then options of the op (a function of dtype where they are tensors).
Options = Callable[[torch.dtype], dict[str, Any]] | dict[str, Any]


def float_mask(*shape: int) -> Callable[[torch.dtype], dict[str, Any]]:
    return lambda dtype: {"attn_mask": torch.randn(shape).to(dtype).requires_grad_()}


def lengths(*values: int, **options: Any) -> dict[str, Any]:
    return {"key_lengths": torch.tensor(values), **options}


CASES: dict[str, tuple[dict[str, Any], Options]] = {
    "plain": ({}, {}),
    "one query, one key": (dict(query_len=1, key_len=1), {}),
    "one element": (dict(batch=1, heads=1, query_len=1, key_len=1, dim=1), {}),
    "odd lengths and dims": (dict(query_len=63, key_len=131, dim=19, value_dim=7), {}),
    "values wider than keys": (dict(dim=8, value_dim=80), {}),
    "head dim 64, several tiles": (dict(batch=1, heads=2, query_len=197, key_len=230, dim=64), {}),
    "head dim 96": (dict(batch=1, heads=1, query_len=50, key_len=49, dim=96), {}),
    "head dim 128": (dict(batch=1, heads=1, query_len=100, key_len=77, dim=128), {}),
    "head dim 256": (dict(batch=1, heads=1, query_len=49, key_len=97, dim=256), {}),
    "head dim beyond 256": (dict(batch=1, heads=1, query_len=20, key_len=33, dim=288, value_dim=300), {}),
    "grouped heads": (dict(kv_heads=2), dict(enable_gqa=True)),
    "one key head for all": (dict(heads=3, kv_heads=1), dict(enable_gqa=True)),
    "grouped heads, float mask": (
        dict(kv_heads=2),
        lambda dtype: {"attn_mask": torch.randn(1, 4, 33, 65).to(dtype).requires_grad_(), "enable_gqa": True},
    ),
    "key lengths": ({}, lengths(65, 17)),
    "key lengths int32, one row empty": ({}, {"key_lengths": torch.tensor([0, 64], dtype=torch.int32)}),
    "causal": ({}, dict(is_causal=True)),
    "causal, more queries than keys": (dict(query_len=70, key_len=20), dict(is_causal=True)),
    "causal bottom right": ({}, dict(is_causal=True, causal_alignment="bottom_right")),
    "causal bottom right, more queries than keys": (
        dict(query_len=70, key_len=20),
        dict(is_causal=True, causal_alignment="bottom_right"),
    ),
    "causal bottom right over key lengths": (
        {},
        lengths(40, 9, is_causal=True, causal_alignment="bottom_right"),
    ),
    "window": ({}, dict(window=(5, 3))),
    "window of the diagonal": ({}, dict(window=(0, 0))),
    "window open to the left": ({}, dict(window=(-1, 2))),
    "window open to the right": ({}, dict(window=(2, -1))),
    "window narrower than a tile, long": (
        dict(batch=1, heads=1, query_len=300, key_len=310),
        dict(window=(9, 0), causal_alignment="bottom_right"),
    ),
    "window bottom right over key lengths, causal": (
        {},
        lengths(50, 33, window=(7, 5), is_causal=True, causal_alignment="bottom_right"),
    ),
    "softcap": (dict(gain=3.0), dict(softcap=2.5)),
    "softcap, float mask, causal": (
        dict(gain=3.0),
        lambda dtype: {**float_mask(2, 1, 33, 65)(dtype), "softcap": 5.0, "is_causal": True},
    ),
    "scale": ({}, dict(scale=0.7)),
    "negative scale": ({}, dict(scale=-0.3)),
    "zero scale": ({}, dict(scale=0.0)),
    "large logits": (dict(gain=40.0), {}),
    "large logits, mask": (dict(gain=40.0), float_mask(33, 65)),
    "dropout": ({}, dict(dropout_p=0.3)),
    "dropout, odd keys, grouped heads": (
        dict(kv_heads=2, key_len=67, query_len=35),
        dict(dropout_p=0.5, enable_gqa=True),
    ),
    "dropout, few queries": (dict(query_len=2, key_len=300), dict(dropout_p=0.4)),
    "dropout of everything": ({}, dict(dropout_p=1.0)),
    "dropout with every mask": (
        {},
        lambda dtype: {
            **float_mask(1, 4, 1, 65)(dtype),
            **lengths(60, 21, is_causal=True, window=(30, 0), dropout_p=0.2),
        },
    ),
    "lse": ({}, dict(return_lse=True)),
    "lse of large logits": (dict(gain=40.0), dict(return_lse=True)),
    "lse with idle rows": ({}, lengths(0, 30, return_lse=True, is_causal=True, causal_alignment="bottom_right")),
    "lse, dropout, float mask": (
        {},
        lambda dtype: {**float_mask(2, 4, 33, 1)(dtype), "return_lse": True, "dropout_p": 0.25},
    ),
    "few queries, many keys": (dict(query_len=1, key_len=1111, dim=32), {}),
    "4 queries, many keys": (dict(query_len=4, key_len=1111, dim=32), dict(return_lse=True)),
    "16 queries, many keys": (dict(batch=1, query_len=16, key_len=1111, dim=32), {}),
    "17 queries, many keys": (dict(batch=1, query_len=17, key_len=1111, dim=32), {}),
    "few queries, more keys to a task than it scores at once": (
        dict(heads=16, query_len=2, key_len=1300, dim=8),
        lambda dtype: {**float_mask(1, 16, 2, 1300)(dtype), **lengths(1290, 1025)},
    ),
    "few queries, wide heads": (
        dict(query_len=3, key_len=150, dim=200, value_dim=136),
        {},
    ),
    "few queries, grouped heads, lengths": (
        dict(heads=4, kv_heads=1, query_len=1, key_len=777, dim=64),
        lengths(700, 3, enable_gqa=True),
    ),
    "few queries, float mask, causal bottom right": (
        dict(query_len=3, key_len=500, dim=24),
        lambda dtype: {
            **float_mask(2, 1, 1, 500)(dtype),
            "is_causal": True,
            "causal_alignment": "bottom_right",
            "return_lse": True,
        },
    ),
    "few queries, window": (
        dict(query_len=2, key_len=600),
        dict(window=(40, 0), causal_alignment="bottom_right", softcap=3.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    shapes, options = CASES[case]
    inputs = make(dtype, **shapes)
    # Scores of a hundred carry the rounding of their own sum into the exponent, whoever adds them up in what order.
    factor = 3.0 if "large logits" in case else 2.0
    options = options(dtype) if callable(options) else options
    check_op(mmk.cross_attention, *inputs, backend=backend, factor=factor, **options)


MASK_SHAPES = [
    *(
        tuple(n if full else 1 for n, full in zip((2, 3, 17, 37), fulls, strict=True))
        for fulls in itertools.product((0, 1), repeat=4)
    ),
    (3, 17, 37),
    (1, 17, 37),
    (3, 1, 37),
    (17, 37),
    (17, 1),
    (1, 37),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", ["bool", "float", "float32", "frozen float"])
@few_dtypes
def test_mask_of_every_broadcast_shape(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype, either_backend: str
) -> None:
    q, k, v = make(dtype, heads=3, query_len=17, key_len=37)
    if kind == "bool":
        mask = torch.rand(shape) > 0.3
    else:
        mask = torch.randn(shape).masked_fill(torch.rand(shape) > 0.8, -torch.inf)
        mask = mask.to(torch.float32 if kind == "float32" else dtype).requires_grad_(kind != "frozen float")
    check_op(mmk.cross_attention, q, k, v, attn_mask=mask, return_lse=True, backend=either_backend)


@few_dtypes
def test_an_expanded_mask_keeps_its_own_gradient_shape(dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(dtype)
    for base in (torch.randn(1, 1, 33, 65), torch.randn(2, 4, 33, 1), torch.randn(1, 1, 1, 1)):
        mask = base.to(dtype).expand(2, 4, 33, 65).requires_grad_()
        check_op(mmk.cross_attention, q, k, v, attn_mask=mask, backend=backend)
        check_op(mmk.cross_attention, q, k, v, attn_mask=mask.detach() > 0, backend=backend)


@few_dtypes
def test_keys_that_one_query_may_not_see_leave_a_mask_gradient_of_zero(dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(dtype, query_len=1, key_len=300)
    mask = torch.randn(2, 4, 1, 300).to(dtype)
    mask[..., :200] = -torch.inf  # whole blocks of keys
    with poisoned_memory():
        check_op(mmk.cross_attention, q, k, v, attn_mask=mask.requires_grad_(), backend=backend)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "B L H D": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "L B H D": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "H B L D": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "rows of a wider matrix": lambda x: F.pad(x, (3, 5))[..., 3:-5],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "last dim strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "last dim outermost": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "one batch expanded": lambda x: x[:1].expand_as(x),
    "one head expanded": lambda x: x[:, :1].expand_as(x),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def test_output_and_gradients_take_the_memory_order_of_their_input(backend: str) -> None:
    q, k, v = (LAYOUTS["B L H D"](x.detach()).requires_grad_() for x in make(value_dim=24))
    out = mmk.cross_attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)
    q = LAYOUTS["L B H D"](q.detach())
    assert mmk.cross_attention(q, k, v).permute(2, 0, 1, 3).is_contiguous()
    assert mmk.cross_attention(*make(value_dim=24)).is_contiguous()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("query_len", [33, 2])
@few_dtypes
def test_padding_never_leaks(garbage: float, query_len: int, dtype: torch.dtype, backend: str) -> None:
    q, k, v = (x.detach() for x in make(dtype, query_len=query_len))
    padding = torch.arange(65) >= torch.tensor([40, 0])[:, None]  # [B, Lk]
    mask = (~padding)[:, None, None]
    bias = torch.zeros(2, 1, 1, 65).masked_fill(padding[:, None, None], -torch.inf)
    for options in ({"key_lengths": torch.tensor([40, 0])}, {"attn_mask": mask}, {"attn_mask": bias}):
        results = []
        for filler in (0.0, garbage):
            inputs = [q.clone(), *(x.masked_fill(padding[:, None, :, None], filler) for x in (k, v))]
            for x in inputs:
                x.requires_grad_()
            out, lse = mmk.cross_attention(*inputs, return_lse=True, **options)
            grads = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
            results.append((out, lse, *grads))
        clean, dirty = results
        assert same_bits(clean, dirty)
        assert all(x.isfinite().all() for x in (clean[0], *clean[2:]))
        assert not clean[0][1].any()
        assert (clean[1][1] == -torch.inf).all()
        for grad in clean[3:]:
            assert not grad.masked_select(padding[:, None, :, None]).any()


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_bad_key_poisons_exactly_the_rows_that_may_attend_to_it(where: str, garbage: float, backend: str) -> None:
    """Two halves of the rows attend to two halves of the keys; a key of the second half is bad."""
    query_len, key_len, bad = 40, 70, 50
    mask = (torch.arange(query_len)[:, None] < 20) == (torch.arange(key_len) < 35)

    def run(poison: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        q, k, v = (x.detach() for x in make(query_len=query_len, key_len=key_len))
        if poison:
            (k if where == "key" else v)[:, :, bad, 3] = garbage
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = mmk.cross_attention(*leaves, attn_mask=mask, return_lse=True)
        return out, lse, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    clean, dirty = run(poison=False), run(poison=True)
    out, lse, dq, dk, dv = dirty
    assert out[:, :, 20:].isnan().all()
    assert lse[:, :, 20:].isnan().all()
    assert dq[:, :, 20:].isnan().all()
    for got, want in zip((out, lse, dq), clean[:3], strict=True):
        assert torch.equal(got[:, :, :20], want[:, :, :20])
    for got, want in zip((dk, dv), clean[3:], strict=True):
        torch.testing.assert_close(got[:, :, :35], want[:, :, :35])


def test_a_row_with_nothing_to_attend_to_gives_zeros_even_if_it_is_nan(backend: str) -> None:
    q, k, v = (x.detach() for x in make(query_len=20))
    q[:, :, 3] = math.nan
    mask = torch.ones(20, 65, dtype=torch.bool)
    mask[3] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = mmk.cross_attention(*leaves, attn_mask=mask, return_lse=True)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not out[:, :, 3].any()
    assert (lse[:, :, 3] == -torch.inf).all()
    assert not grads[0][:, :, 3].any()
    assert all(g.isfinite().all() for g in grads)


EMPTY = {
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no queries": dict(query_len=0),
    "no keys": dict(key_len=0),
    "no features": dict(dim=0, value_dim=8),
    "no value features": dict(value_dim=0),
    "no queries, no keys": dict(query_len=0, key_len=0),
}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@few_dtypes
def test_empty_sizes(empty: str, masked: bool, dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(dtype, **EMPTY[empty])
    options: dict[str, Any] = {}
    if masked:
        options = {
            "attn_mask": torch.randn(q.shape[2], k.shape[2]).to(dtype).requires_grad_(),
            "key_lengths": torch.full((q.shape[0],), k.shape[2] // 2),
            "is_causal": True,
        }
    out, lse = check_op(mmk.cross_attention, q, k, v, return_lse=True, backend=backend, **options)
    assert out.shape == (*q.shape[:3], v.shape[3])
    if empty == "no keys":
        assert not out.any()
        assert (lse == -torch.inf).all()
    if empty == "no features" and not masked:
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), rtol=1e-2, atol=1e-2)


def test_only_the_gradients_asked_for_are_computed(backend: str) -> None:
    everything = [*make(), torch.randn(1, 4, 33, 65, requires_grad=True)]
    full = torch.autograd.grad(mmk.cross_attention(*everything[:3], attn_mask=everything[3]).sum(), everything)
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [x.detach().requires_grad_(w) for x, w in zip(everything, wanted, strict=True)]
        out = mmk.cross_attention(*leaves[:3], attn_mask=leaves[3])
        some = torch.autograd.grad(out.sum(), [x for x in leaves if x.requires_grad])
        assert agree(some, [g for g, w in zip(full, wanted, strict=True) if w])


def test_forward_keeps_nothing_of_score_size_for_backward(backend: str) -> None:
    q, k, v = make(query_len=100, key_len=200)
    known, kept = {x.data_ptr() for x in (q, k, v)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mmk.cross_attention(q, k, v)
    extra = sum(x.numel() for x in kept if x.data_ptr() not in known)
    assert extra <= q.numel() + 2 * 2 * 4 * 100


@few_dtypes
def test_second_derivatives(dtype: torch.dtype, backend: str) -> None:
    def second(inputs: list[Tensor], name: str) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with mmk.use_backend(name):
            out, lse = mmk.cross_attention(*leaves[:3], attn_mask=leaves[3], return_lse=True, softcap=3.0)
            first = torch.autograd.grad((out.sin().sum() + lse.sum()), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    inputs = [*make(dtype, query_len=9, key_len=11), torch.randn(1, 4, 1, 11).to(dtype)]
    ours, plain = second(inputs, backend), second(inputs, "reference")
    exact = second([x.double() for x in inputs], "reference")
    largest = max(float(x.abs().max()) for x in exact)
    for got, same_dtype, oracle in zip(ours, plain, exact, strict=True):
        assert_close_to_oracle(got, same_dtype, oracle, name="second derivative", scale=largest)


def everything(query_len: int, key_len: int, heads: int = 2, batch: int = 1, **options: Any) -> tuple[Tensor, ...]:
    """Outputs and gradients of one call with a bias that is shared by the batch."""
    torch.manual_seed(2)
    q, k, v = make(batch=batch, heads=heads, query_len=query_len, key_len=key_len, dim=24)
    bias = torch.randn(1, 1, 1, key_len, requires_grad=True)
    out, lse = mmk.cross_attention(q, k, v, attn_mask=bias, return_lse=True, **options)
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v, bias), (out.detach().cos(), lse.detach().sin()))


SPLITS = {
    "one head": dict(query_len=301, key_len=280, heads=1),
    "several heads": dict(query_len=150, key_len=90, heads=3, batch=2),
    "few queries": dict(query_len=2, key_len=2500),
    "causal with dropout": dict(query_len=200, key_len=200, is_causal=True, dropout_p=0.1),
}


@pytest.mark.parametrize("split", SPLITS)
def test_results_are_bitwise_the_same_for_any_number_of_threads_and_every_run(split: str, native_isa: str) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(everything(**SPLITS[split]))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("split", SPLITS)
def test_every_element_of_fresh_memory_is_written(split: str, native_isa: str) -> None:
    want = everything(**SPLITS[split])
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert agree(want, everything(**SPLITS[split]))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_memory_does_not_grow_with_the_scores(masked: bool, native_isa: str) -> None:
    """10000 × 10000 scores would be 400 MB in float32."""
    from mmkernels import _native

    code = f"""
import resource, torch, mmkernels as mmk
from mmkernels import _native
_native.set_isa({_native.isa()!r})
q, k, v = (torch.randn(1, 1, 10000, 4, requires_grad=True) for _ in range(3))
bias = torch.randn(1, 1, 1, 10000, requires_grad=True) if {masked} else None
mmk.cross_attention(*(x[:, :, :100] for x in (q, k, v))).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mmk.cross_attention(q, k, v, attn_mask=bias, window=(600, 0)).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 100


@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_the_reference_agrees_with_torch(kind: str) -> None:
    q, k, v = (x.double() for x in make(batch=3, query_len=13, key_len=21))
    options: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.randn(3, 1, 1, 21) > -0.5},
    }[kind]
    with mmk.use_backend("reference"):
        ours = mmk.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, **options))
