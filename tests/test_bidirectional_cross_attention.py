"""bidirectional_cross_attention on every backend and instruction set: outputs and gradients against float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from agreement import agree
from conftest import FUZZED, use_implementation
from environment import DEVICE, HERE
from fusion_cases import allocations, each_dtype, few_dtypes, leaf
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from row_ops import strided
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, same_bits


def make(
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (50, 17),
    batch: int = 2,
    heads: int = 2,
    dim: int = 16,
    value_dim: int | None = None,
    gain: float = 1.0,
) -> list[Tensor]:
    """x_query, y_key, x_value, y_value, random, requiring grad."""
    value_dim = dim if value_dim is None else value_dim
    x, y = lengths
    return [
        leaf(batch, heads, x, dim, dtype=dtype, gain=gain),
        leaf(batch, heads, y, dim, dtype=dtype),
        leaf(batch, heads, x, value_dim, dtype=dtype),
        leaf(batch, heads, y, value_dim, dtype=dtype),
    ]


def real(batch: int, length: int) -> Tensor:
    """A mask of about two thirds real tokens, in no order."""
    return torch.rand(batch, length, generator=torch.Generator(torch.get_default_device()).manual_seed(length)) < 0.67


def masks(lengths: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    return {"x_mask": real(batch, lengths[0]), "y_mask": real(batch, lengths[1])}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a few tokens": (dict(lengths=(5, 3)), {}),
    "one token each": (dict(lengths=(1, 1)), {}),
    "y is longer": (dict(lengths=(17, 70)), {}),
    "odd sizes": (dict(lengths=(97, 31), dim=19, value_dim=7), {}),
    "very unequal lengths": (dict(batch=1, heads=1, lengths=(1300, 5), dim=8), {}),
    "several blocks of each": (dict(batch=1, lengths=(230, 197), dim=24), {}),
    "strips of one head": (dict(batch=1, heads=1, lengths=(900, 20), dim=12), {}),
    "values wider than keys": (dict(dim=8, value_dim=80), {}),
    "masks": ({}, masks((50, 17))),
    "masks over several blocks": (dict(batch=1, lengths=(130, 110)), masks((130, 110), 1)),
    "a mask of x": ({}, {"x_mask": real(2, 50)}),
    "all of y is padding": ({}, {"y_mask": torch.tensor([[True] * 17, [False] * 17])}),
    "all of x is padding": ({}, {"x_mask": torch.tensor([[False] * 50, [True] * 50]), "y_mask": real(2, 17)}),
    "clamp": (dict(gain=3.0), dict(clamp=1.5)),
    "clamp and masks": (dict(gain=3.0, lengths=(17, 50)), dict(clamp=1.5, **masks((17, 50)))),
    "clamp to nothing": ({}, dict(clamp=0.0)),
    "scale": ({}, dict(scale=0.7)),
    "negative scale": ({}, dict(scale=-0.4, **masks((50, 17)))),
    "zero scale": ({}, dict(scale=0.0)),
    "large logits": (dict(gain=40.0), {}),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    sizes, options = CASES[case]
    factor = 3.0 if "large" in case else 2.0  # the rounding of large scores enters the exponent, whoever adds them up
    check_op(mmk.bidirectional_cross_attention, *make(dtype, **sizes), backend=backend, factor=factor, **options)


@few_dtypes
def test_it_is_two_attentions(dtype: torch.dtype, backend: str) -> None:
    x_query, y_key, x_value, y_value = leaves = make(dtype, lengths=(120, 33))
    options = masks((120, 33))
    outs = mmk.bidirectional_cross_attention(*leaves, **options)
    separate = [
        mmk.cross_attention(x_query, y_key, y_value, attn_mask=options["y_mask"][:, None, None]),
        mmk.cross_attention(y_key, x_query, x_value, attn_mask=options["x_mask"][:, None, None]),
    ]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(outs, tuple(separate), **tolerance)
    grads = [torch.randn_like(o) for o in outs]
    pulled = (torch.autograd.grad(results, leaves, grads) for results in (outs, separate))
    for got, expected in zip(*pulled, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@few_dtypes
def test_padding_never_leaks(garbage: float, dtype: torch.dtype, backend: str) -> None:
    """What is not finite in padding counts as zero, for results and gradients alike."""
    lengths = (40, 20)
    options = masks(lengths)
    padded = [~options[name][:, None, :, None] for name in ("x_mask", "y_mask", "x_mask", "y_mask")]
    clean = [x.detach() for x in make(dtype, lengths=lengths)]

    def run(filler: float) -> list[Tensor]:
        leaves = [x.masked_fill(p, filler).requires_grad_() for x, p in zip(clean, padded, strict=True)]
        outs = mmk.bidirectional_cross_attention(*leaves, **options)
        grads = torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])
        if filler == 0.0:  # of what stands in for garbage nothing depends
            grads = tuple(g.masked_fill(p, 0) for g, p in zip(grads, padded, strict=True))
        return [*outs, *grads]

    results, spoiled = run(0.0), run(garbage)
    assert all(x.isfinite().all() for x in results)
    assert same_bits(results, spoiled)


def test_a_real_token_that_is_not_finite_shows(backend: str) -> None:
    x_query, y_key, x_value, y_value = (x.detach() for x in make())
    y_value[0, 0, 3] = torch.nan
    x_out, y_out = mmk.bidirectional_cross_attention(x_query, y_key, x_value, y_value, **masks((50, 17)))
    visible = bool(masks((50, 17))["y_mask"][0, 3])
    assert visible and x_out[0, 0].isnan().all() and x_out[1].isfinite().all() and y_out.isfinite().all()


def test_outputs_and_gradients_take_the_memory_order_of_their_side(backend: str) -> None:
    leaves = make(value_dim=24)
    leaves[0] = leaves[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    x_out, y_out = mmk.bidirectional_cross_attention(*leaves)
    assert x_out.transpose(1, 2).is_contiguous() and y_out.is_contiguous()
    grads = torch.autograd.grad(x_out.sum() + y_out.sum(), leaves)
    assert grads[0].transpose(1, 2).is_contiguous() and all(g.is_contiguous() for g in grads[1:])


def test_scores_are_never_held(native_isa: str) -> None:
    leaves = make(batch=1, heads=1, lengths=(2000, 600), dim=8)
    scores = 4 * 2000 * 600

    def train() -> None:
        outs = mmk.bidirectional_cross_attention(*leaves)
        torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])

    assert max(allocations(train)) < scores // 4


EMPTY: dict[str, dict[str, Any]] = {
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no x": dict(lengths=(0, 5)),
    "no y": dict(lengths=(5, 0)),
    "no features": dict(dim=0, value_dim=8),
    "no value features": dict(value_dim=0),
}


@pytest.mark.parametrize("empty", EMPTY)
@few_dtypes
def test_empty_sizes(empty: str, dtype: torch.dtype, backend: str) -> None:
    leaves = make(dtype, **EMPTY[empty])
    results = check_op(mmk.bidirectional_cross_attention, *leaves, backend=backend)
    x_shape, y_shape = (t.shape[:3] for t in leaves[:2])
    width = leaves[2].shape[3]
    assert [x.shape for x in results[:2]] == [(*x_shape, width), (*y_shape, width)]


# --- what torch asks of every op --------------------------------------------------------------------------------------


def joined(*leaves: Tensor) -> Tensor:
    """Both outputs of a call with masks and clamp, as one tensor."""
    x_mask = torch.arange(leaves[0].shape[2], device=leaves[0].device).expand(leaves[0].shape[0], -1) != 1
    outs = mmk.bidirectional_cross_attention(*leaves, x_mask=x_mask, clamp=1.0)
    return torch.cat([o.flatten(1) for o in outs], 1)


def joined_leaves(batch: int = 2, lengths: tuple[int, int] = (9, 5), dim: int = 8) -> list[Tensor]:
    return make(batch=batch, lengths=lengths, dim=dim)


def test_autocast_casts_the_tokens_as_torch_casts_them(either_backend: str) -> None:
    leaves = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        outs = mmk.bidirectional_cross_attention(*leaves)
    assert agree(outs, mmk.bidirectional_cross_attention(*(x.bfloat16() for x in leaves)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(outs[0].sum(), leaves))


def test_an_output_that_nobody_uses_counts_as_zeros(either_backend: str) -> None:
    leaves = make()
    some = torch.autograd.grad(mmk.bidirectional_cross_attention(*leaves)[1].sum(), leaves)
    outs = mmk.bidirectional_cross_attention(*leaves)
    zeros = [torch.zeros_like(outs[0]), torch.ones_like(outs[1])]
    assert agree(some, torch.autograd.grad(outs, leaves, zeros))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    length = st.one_of(st.integers(0, 5), st.integers(0, 220))
    lengths, batch = (draw(length), draw(length)), draw(st.integers(0, 3))
    leaves = make(
        draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        lengths,
        batch,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 70)),
    )
    leaves = [x.detach().requires_grad_(draw(st.booleans())) for x in leaves]
    leaves = [strided(x) if draw(st.integers(0, 3)) == 0 else x for x in leaves]
    options: dict[str, Any] = {name: mask for name, mask in masks(lengths, batch).items() if draw(st.booleans())}
    options["scale"] = draw(st.sampled_from((None, None, 0.3, -0.1)))
    options["clamp"] = draw(st.sampled_from((None, None, 0.5)))
    return leaves, options


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Tensor], dict[str, Any]], implementation: Any) -> None:
    leaves, options = call
    for backend in use_implementation(implementation):
        check_op(mmk.bidirectional_cross_attention, *leaves, backend=backend, **options)


# --- bad input --------------------------------------------------------------------------------------------------------

x, y = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 5, 8)
one = (x, y, x, y)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "x_query: expected a torch.Tensor; got int", (3, y, x, y), {}),
    (TypeError, "y_value: expected a torch.Tensor; got NoneType", (x, y, x, None), {}),
    (TypeError, "x_query: expected dtype float32", (x.int(), y.int(), x.int(), y.int()), {}),
    (TypeError, "x_value: expected the dtype of x_query, torch.float32", (x, y, x.half(), y), {}),
    (RuntimeError, f"y_key: expected the device of x_query, {HERE}; got meta", (x, y.to("meta"), x, y), {}),
    (ValueError, "x_query: expected 4 dims (B, H, Lx, D); got shape (4, 3, 8)", (x[0], y, x, y), {}),
    (ValueError, "y_key: expected shape (2, 4, Ly, 8); got (2, 4, 5, 7)", (x, y[..., 1:], x, y), {}),
    (ValueError, "y_key: expected shape (2, 4, Ly, 8); got (1, 4, 5, 8)", (x, y[:1], x, y), {}),
    (ValueError, "x_value: expected shape (2, 4, 3, Dv); got (2, 4, 5, 8)", (x, y, y, y), {}),
    (ValueError, "y_value: expected shape (2, 4, 5, 8); got (2, 4, 5, 7)", (x, y, x, y[..., 1:]), {}),
    (TypeError, "x_mask: expected a torch.Tensor; got list", one, {"x_mask": [True]}),
    (TypeError, "x_mask: expected dtype torch.bool; got torch.float32", one, {"x_mask": torch.zeros(2, 3)}),
    (ValueError, "y_mask: expected shape (2, 5); got (2, 3)", one, {"y_mask": torch.zeros(2, 3).bool()}),
    (TypeError, "scale: expected a number; got str", one, {"scale": "1"}),
    (ValueError, "clamp: expected a finite number ≥ 0, or None; got -1.0", one, {"clamp": -1.0}),
]


@pytest.mark.parametrize(("error", "message", "tensors", "options"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, tensors: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^bidirectional_cross_attention: " + re.escape(message)):
        mmk.bidirectional_cross_attention(*tensors, **options)
