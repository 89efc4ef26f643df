"""Sinks, attn_bias beside attn_mask, masks of other dtypes, batches of 1: what cross_attention takes beside torch's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from test_cross_attention import each_dtype, few_dtypes, lengths, make
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits

# --- sinks ------------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "plain": ({}, dict),
    "lse": ({}, lambda: dict(return_lse=True)),
    "one query, one key": (dict(query_len=1, key_len=1), dict),
    "several tiles, odd sizes": (dict(batch=1, query_len=197, key_len=231, dim=19, value_dim=7), dict),
    "grouped heads": (dict(kv_heads=2), lambda: dict(enable_gqa=True, return_lse=True)),
    "large logits": (dict(gain=40.0), dict),
    "few queries, keys in parts": (dict(query_len=2, key_len=1300), dict),
    "few queries, grouped heads, softcap": (
        dict(query_len=3, kv_heads=1, key_len=600),
        lambda: dict(enable_gqa=True, softcap=3.0),
    ),
    "16 queries, keys in parts": (dict(batch=1, query_len=16, key_len=1111), lambda: dict(return_lse=True)),
    "idle rows": (
        {},
        lambda: lengths(0, 30, return_lse=True, is_causal=True, causal_alignment="bottom_right"),
    ),
    "window, softcap, negative scale": ({}, lambda: dict(window=(5, 3), softcap=2.0, scale=-0.3)),
    "float mask": ({}, lambda: dict(attn_mask=torch.randn(1, 4, 33, 65).requires_grad_(), return_lse=True)),
    "float mask the same for all keys": ({}, lambda: dict(attn_mask=torch.randn(4, 33, 1).requires_grad_())),
    "one number for all scores": (
        dict(query_len=2, key_len=1300),
        lambda: dict(attn_mask=torch.randn(1, 1).requires_grad_(), return_lse=True),
    ),
    "bool mask, few queries": (dict(query_len=4), lambda: dict(attn_mask=torch.rand(2, 1, 1, 65) > 0.5)),
    "dropout": ({}, lambda: dict(dropout_p=0.3)),
    "no keys": (dict(key_len=0), lambda: dict(return_lse=True)),
    "no queries": (dict(query_len=0), lambda: dict(return_lse=True)),
    "no batch": (dict(batch=0), lambda: dict(return_lse=True)),
    "no heads": (dict(heads=0), lambda: dict(return_lse=True)),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients_with_sinks(case: str, dtype: torch.dtype, backend: str) -> None:
    sizes, options = CASES[case]
    inputs = make(dtype, **sizes)
    sinks = torch.randn(inputs[0].shape[1]) * 3
    sinks[1:2] = -torch.inf  # is none
    check = dict(factor=3.0) if case == "large logits" else {}
    for kind in (torch.float32, dtype):
        given = {**options(), "sinks": sinks.to(kind).requires_grad_()}
        check_op(mmk.cross_attention, *inputs, backend=backend, **check, **given)
        with torch.no_grad():  # few queries have a kernel of their own then
            check_op(mmk.cross_attention, *inputs, backend=backend, grad=False, **check, **given)


def as_in_gpt_oss(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor | None) -> Tensor:
    """The sinks as a column of logits that softmax sees and the product with V does not."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    logits = torch.cat([scores, column], -1)
    logits = logits - logits.max(-1, keepdim=True).values
    return F.softmax(logits, -1)[..., :-1] @ v


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("query_len", [33, 3])
def test_sinks_are_a_column_of_logits(masked: bool, query_len: int, backend: str) -> None:
    leaves = [*make(query_len=query_len), torch.randn(4, requires_grad=True)]
    mask = torch.zeros(query_len, 65).masked_fill(torch.rand(query_len, 65) > 0.5, -torch.inf) if masked else None
    if mask is not None:
        mask[1] = -torch.inf  # all that this row attends to is its sink
    got = mmk.cross_attention(*leaves[:3], attn_mask=mask, sinks=leaves[3])
    want = as_in_gpt_oss(*leaves, mask)
    torch.testing.assert_close(got, want)
    pairs = zip(
        torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("query_len", [20, 2])
def test_a_row_with_its_sink_alone_gives_zeros_even_if_it_is_nan(query_len: int, backend: str) -> None:
    q, k, v = (x.detach() for x in make(query_len=query_len))
    q[:, :, 1] = math.nan
    k[:, :, 7] = math.inf
    mask = torch.ones(query_len, 65, dtype=torch.bool)
    mask[1] = False
    mask[:, 7] = False
    leaves = [x.requires_grad_() for x in (q, k, v, torch.tensor([0.5, -2.0, 90.0, torch.finfo(torch.float32).min]))]
    out, lse = mmk.cross_attention(*leaves[:3], attn_mask=mask, sinks=leaves[3], return_lse=True)
    assert not out[:, :, 1].any()
    assert torch.equal(lse[:, :, 1], leaves[3].detach().expand(2, 4))
    cotangent = torch.ones_like(out)
    cotangent[:, :, 1] = math.nan
    grads = torch.autograd.grad((out, lse), leaves, (cotangent, torch.ones_like(lse)))
    assert not grads[0][:, :, 1].any()
    assert all(g.isfinite().all() for g in grads)
    with torch.no_grad():
        again = mmk.cross_attention(*leaves[:3], attn_mask=mask, sinks=leaves[3])
    torch.testing.assert_close(again, out.detach())


@pytest.mark.parametrize("query_len", [33, 2])
def test_a_sink_of_nan_spoils_its_head_alone(query_len: int, backend: str) -> None:
    q, k, v = make(query_len=query_len)
    clean, dirty = torch.zeros(4), torch.tensor([0.0, math.nan, 0.0, 0.0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            want, got = (mmk.cross_attention(q, k, v, sinks=s) for s in (clean, dirty))
        assert got[:, 1].isnan().all()
        assert torch.equal(got[:, [0, 2, 3]], want[:, [0, 2, 3]])


def test_only_the_gradients_asked_for_are_computed_with_sinks(backend: str) -> None:
    everything = [*make(), torch.randn(4, requires_grad=True)]
    full = torch.autograd.grad(mmk.cross_attention(*everything[:3], sinks=everything[3]).sin().sum(), everything)
    for wanted in itertools.product((False, True), repeat=4):
        if not any(wanted):
            continue
        leaves = [x.detach().requires_grad_(w) for x, w in zip(everything, wanted, strict=True)]
        out = mmk.cross_attention(*leaves[:3], sinks=leaves[3])
        some = torch.autograd.grad(out.sin().sum(), [x for x in leaves if x.requires_grad])
        assert agree(some, [g for g, w in zip(full, wanted, strict=True) if w])


# --- attn_bias beside attn_mask ---------------------------------------------------------------------------------------

FULL = (2, 3, 17, 137)
SHAPES = {
    "full": FULL,
    "every key": (2, 1, 1, 137),
    "every query": (1, 3, 17, 1),
    "heads": (1, 3, 17, 137),
    "queries and keys": (17, 137),
    "one number": (1, 1),
}


@pytest.mark.parametrize("mask_shape", SHAPES)
@pytest.mark.parametrize("bias_shape", SHAPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
@few_dtypes
def test_mask_and_bias_of_every_shape(
    mask_shape: str, bias_shape: str, kind: str, dtype: torch.dtype, either_backend: str
) -> None:
    shapes = [SHAPES[mask_shape], SHAPES[bias_shape]]
    for query_len in (17, 1):
        inputs = make(dtype, heads=3, query_len=query_len, key_len=137)
        sizes = [tuple(min(n, query_len) if i == len(s) - 2 else n for i, n in enumerate(s)) for s in shapes]
        if kind == "bool":
            mask = torch.rand(sizes[0]) > 0.3
            if mask.shape[-1] > 1:
                mask[..., :128] &= torch.rand(*mask.shape[:-2], 1, 1) > 0.5  # whole blocks of keys
        else:
            mask = torch.randn(sizes[0]).masked_fill(torch.rand(sizes[0]) > 0.8, -torch.inf).to(dtype).requires_grad_()
        bias = torch.randn(sizes[1]).masked_fill(torch.rand(sizes[1]) > 0.9, -torch.inf).requires_grad_()
        options = dict(attn_mask=mask, attn_bias=bias, return_lse=True)
        check_op(mmk.cross_attention, *inputs, backend=either_backend, **options)
        with torch.no_grad():
            options["return_lse"] = False
            check_op(mmk.cross_attention, *inputs, backend=either_backend, grad=False, **options)


@pytest.mark.parametrize("frozen", ["mask", "bias", "both"])
@few_dtypes
def test_a_frozen_mask_or_bias(frozen: str, dtype: torch.dtype, backend: str) -> None:
    mask = torch.randn(2, 1, 1, 65).to(dtype).requires_grad_(frozen == "bias")
    bias = torch.randn(1, 4, 33, 65).to(dtype).requires_grad_(frozen == "mask")
    for options in ({}, lengths(60, 9), dict(softcap=2.0), dict(dropout_p=0.3), dict(window=(20, 5))):
        check_op(mmk.cross_attention, *make(dtype), attn_mask=mask, attn_bias=bias, backend=backend, **options)


@few_dtypes
def test_a_bias_alone_is_a_mask(dtype: torch.dtype, backend: str) -> None:
    q, k, v = make(dtype)
    bias = torch.randn(1, 4, 33, 65).to(dtype).requires_grad_()
    results = []
    for argument in ("attn_bias", "attn_mask"):
        out = mmk.cross_attention(q, k, v, **{argument: bias})
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v, bias))))
    assert agree(*results)


@pytest.mark.parametrize("query_len", [33, 2])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_bias_behind_the_mask_never_leaks(query_len: int, garbage: float, backend: str) -> None:
    hidden = torch.arange(65) >= torch.tensor([40, 0])[:, None, None, None]  # [B, 1, 1, Lk]
    inputs = [x.detach() for x in make(query_len=query_len)]
    for mask in (~hidden, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)):
        results = []
        for filler in (0.0, garbage):
            leaves = [x.clone().requires_grad_() for x in (*inputs, torch.zeros(2, 4, query_len, 65))]
            bias = leaves[3].masked_fill(hidden, filler)
            out = mmk.cross_attention(*leaves[:3], attn_mask=mask, attn_bias=bias)
            results.append((out, *torch.autograd.grad(out.sum(), leaves)))
        assert same_bits(*results)
        assert all(x.isfinite().all() for x in results[1])


def test_the_bias_may_hide_what_is_bad(backend: str) -> None:
    q, k, v = (x.detach() for x in make())
    k[:, :, 9] = math.nan
    bias = torch.zeros(65)
    bias[9] = -torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.rand(33, 65) > 0.2
    out = mmk.cross_attention(*leaves, attn_mask=mask, attn_bias=bias[None])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_an_expanded_bias_keeps_its_own_gradient_shape(backend: str) -> None:
    bias = torch.randn(1, 4, 33, 1).expand(2, 4, 33, 65).requires_grad_()
    mask = torch.randn(1, 1, 1, 65).expand(2, 1, 33, 65).requires_grad_()
    check_op(mmk.cross_attention, *make(), attn_mask=mask, attn_bias=bias, backend=backend)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_dtype
def test_a_float_mask_of_any_dtype(other: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    inputs = make(dtype)
    mask, bias = torch.randn(1, 4, 33, 65).to(other), torch.randn(2, 1, 1, 65).to(other)
    leaves = [x.requires_grad_() for x in (mask, bias)]
    out = mmk.cross_attention(*inputs, attn_mask=mask, attn_bias=bias)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == other and g.shape == x.shape for g, x in zip(grads, leaves, strict=True))
    wide = [x.detach().to(torch.float32).requires_grad_() for x in leaves]
    same = mmk.cross_attention(*inputs, attn_mask=wide[0], attn_bias=wide[1])
    torch.testing.assert_close(out, same)


def test_a_mask_of_another_dtype_is_not_expanded() -> None:
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, 1, 1 << 20, 1 << 20)
    q = torch.zeros(1, 1, 1, 8).expand(1, 1, 1 << 20, 8)
    with pytest.raises(ValueError, match="window"):  # what comes after the mask would be eight terabytes
        mmk.cross_attention(q, q, q, attn_mask=mask, window=(-2, 0))


# --- batches of 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ones", [(0,), (1, 2), (2,), (0, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("query_len", [33, 2])
@few_dtypes
def test_a_batch_of_1_is_broadcast(ones: tuple[int, ...], query_len: int, dtype: torch.dtype, backend: str) -> None:
    tensors = [x.detach() for x in make(dtype, batch=3, query_len=query_len)]
    inputs = [(x[:1] if i in ones else x).clone().requires_grad_() for i, x in enumerate(tensors)]
    options: dict[str, Any] = {
        **lengths(65, 9, 30),
        "attn_mask": torch.randn(3, 1, 1, 65).to(dtype).requires_grad_(),
        "return_lse": True,
    }
    check_op(mmk.cross_attention, *inputs, backend=backend, **options)
    out = mmk.cross_attention(*inputs)
    assert out.shape == (3, 4, query_len, 16)
    assert out.is_contiguous()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs), rtol=2e-2, atol=2e-2)
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert mmk.cross_attention(*transposed).transpose(1, 2).is_contiguous()


# --- inside torch -----------------------------------------------------------------------------------------------------


def leaves_of_all() -> list[Tensor]:
    shapes = ((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8), (2, 1, 1, 9), (1, 4, 7, 9), (4,))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def call_of_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    out, lse = mmk.cross_attention(
        q, k, v, attn_mask=mask, attn_bias=bias, sinks=sinks, is_causal=True, softcap=3.0, return_lse=True
    )
    return out.sin().sum() + lse.sum()


@pytest.mark.parametrize("alike", [False, True], ids=["shapes of their own", "one shape"])
def test_opcheck_with_sinks_and_bias(alike: bool) -> None:
    inputs = leaves_of_all()
    if alike:  # one gradient serves both
        inputs[3] = torch.randn_like(inputs[4]).requires_grad_()
    options = (None, -1, 0, False, 0.0, 0.3, 0.0, None, False, True)
    torch.library.opcheck(torch.ops.mmkernels.cross_attention.default, (*inputs, *options, True))
    out, (lse,), stats = torch.ops.mmkernels.cross_attention(*inputs, *options, True)
    outputs = [out.detach(), lse.detach()]
    grads = [torch.randn_like(x) for x in outputs]
    arguments = (grads, *inputs, *options, [*outputs, stats.detach()], [True] * 6 + [False] * 2)
    torch.library.opcheck(torch.ops.mmkernels.cross_attention_backward.default, arguments)


def test_compile_and_func_with_sinks_and_bias(backend: str) -> None:
    torch._dynamo.reset()
    leaves = leaves_of_all()
    want = torch.autograd.grad(call_of_all(*leaves), leaves)
    compiled = torch.compile(call_of_all, fullgraph=True, backend="aot_eager")
    assert agree(torch.autograd.grad(compiled(*leaves), leaves), want)
    got = torch.func.grad(call_of_all, argnums=tuple(range(6)))(*(x.detach() for x in leaves))
    assert agree(got, want)


@pytest.mark.parametrize("mapped", [(0,) * 6, (0, None, None, None, None, None), (None, 0, 0, None, 0, None)], ids=str)
def test_vmap_with_sinks_and_bias_equals_a_loop(mapped: tuple[int | None, ...], backend: str) -> None:
    inputs = [x.detach() for x in leaves_of_all()]
    inputs = [x if d is None else torch.stack([x, x + 1, x * 2]) for x, d in zip(inputs, mapped, strict=True)]
    for argnums in (tuple(range(6)), (0, 3, 4)):
        gradients = torch.func.grad(call_of_all, argnums=argnums)
        got = torch.vmap(gradients, in_dims=mapped)(*inputs)
        pairs = list(zip(inputs, mapped, strict=True))
        examples = [gradients(*(x if d is None else x[i] for x, d in pairs)) for i in range(3)]
        for batched, one_by_one in zip(got, zip(*examples, strict=True), strict=True):
            torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-4, atol=1e-5)


def test_second_derivatives_with_sinks_and_bias(backend: str) -> None:
    leaves = [x.detach().double().requires_grad_() for x in leaves_of_all()]
    with mmk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(call_of_all, leaves, nondet_tol=0.0, fast_mode=True)
    leaves = leaves_of_all()

    def second(name: str) -> tuple[Tensor, ...]:
        with mmk.use_backend(name):
            first = torch.autograd.grad(call_of_all(*leaves), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, plain in zip(second(backend), second("reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_autocast_leaves_masks_and_sinks(backend: str) -> None:
    leaves = leaves_of_all()
    with torch.autocast("cpu", torch.bfloat16):
        out = mmk.cross_attention(*leaves[:3], attn_mask=leaves[3], attn_bias=leaves[4], sinks=leaves[5])
    assert out.dtype == torch.bfloat16
    halves = [x.to(torch.bfloat16) for x in leaves[:3]]
    assert torch.equal(out, mmk.cross_attention(*halves, attn_mask=leaves[3], attn_bias=leaves[4], sinks=leaves[5]))


def of_all_sizes(**sizes: int) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    q, k, v = make(**sizes)
    extra = [torch.randn(s).requires_grad_() for s in ((2, 1, 1, k.shape[2]), (1, 4, q.shape[2], k.shape[2]), (4,))]
    out, lse = mmk.cross_attention(q, k, v, attn_mask=extra[0], attn_bias=extra[1], sinks=extra[2], return_lse=True)
    cotangents = (out.detach().cos(), lse.detach().sin())
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v, *extra), cotangents)


@pytest.mark.parametrize("sizes", [dict(query_len=301, key_len=280), dict(query_len=2, key_len=2500)], ids=str)
def test_any_number_of_threads_gives_the_same_bits_with_sinks_and_bias(sizes: dict[str, int], native_isa: str) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(of_all_sizes(**sizes))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_other_kernels_say_that_they_have_no_sinks() -> None:
    q, k, v = (x.detach() for x in make())
    for name in ("triton", "cuda"):
        with mmk.use_backend(name), pytest.raises(mmk.UnsupportedError):
            mmk.cross_attention(q, k, v, sinks=torch.zeros(4))


x = torch.zeros(2, 4, 7, 8)
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "sinks: expected a torch.Tensor; got list", dict(sinks=[0.0] * 4)),
    (TypeError, "sinks: expected a floating dtype; got torch.int64", dict(sinks=torch.zeros(4, dtype=torch.int64))),
    (ValueError, r"sinks: expected shape \(4,\), one for each head of query; got \(3,\)", dict(sinks=torch.zeros(3))),
    (ValueError, r"sinks: expected shape \(4,\), .* got \(1, 4\)", dict(sinks=torch.zeros(1, 4))),
    (TypeError, "attn_bias: expected a floating dtype; got torch.bool", dict(attn_bias=torch.ones(7, 7).bool())),
    (ValueError, r"attn_bias: expected a shape broadcastable to \(2, 4, 7, 7\)", dict(attn_bias=torch.ones(7, 6))),
    (ValueError, "attn_bias: expected 2 to 4 dims", dict(attn_bias=torch.ones(7))),
    (RuntimeError, "attn_bias: expected the device of query", dict(attn_bias=torch.ones(7, 7, device="meta"))),
]


@pytest.mark.parametrize(("error", "message", "options"), BAD, ids=[message[:40] for _, message, _ in BAD])
def test_bad_sinks_and_biases(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^cross_attention: {message}"):
        mmk.cross_attention(x, x, x, **options)
