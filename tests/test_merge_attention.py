"""merge_attention on every backend and instruction set: outputs and all gradients against the float64 reference."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from agreement import agree
from environment import HERE
from fusion_cases import each_dtype, few_dtypes
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op


def make(
    dtype: torch.dtype = torch.float32,
    parts: int = 2,
    shape: tuple[int, ...] = (2, 3, 11, 19),
    gain: float = 1.0,
    absent: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random outputs and lses that require grad, a share of the latter −inf."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(parts)]
    lses = [
        (torch.randn(shape[:-1], dtype=wide) * gain).masked_fill(torch.rand(shape[:-1]) < absent, -torch.inf)
        for _ in range(parts)
    ]
    return outputs, [x.requires_grad_() for x in lses]


CASES: dict[str, dict[str, Any]] = {
    "two parts": {},
    "one part": dict(parts=1),
    "nine parts": dict(parts=9),
    "whole vectors": dict(shape=(3, 70, 64)),
    "no leading dims but length": dict(shape=(5, 8)),
    "large lses": dict(gain=1e3),
    "some attend to nothing": dict(parts=3, absent=0.5),
    "all attend to nothing": dict(absent=1.0),
    "no rows": dict(shape=(2, 0, 8)),
    "no features": dict(shape=(2, 4, 0)),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_outputs_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    check_op(mmk.merge_attention, *make(dtype, **CASES[case]), backend=backend)


@few_dtypes
def test_parts_of_the_keys_merge_to_the_whole_with_its_gradients(dtype: torch.dtype, backend: str) -> None:
    q, k, v = (torch.randn(2, 4, n, 32).to(dtype).requires_grad_() for n in (20, 130, 130))

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [slice(0, 31), slice(31, 31), slice(31, 130)]
        pairs = [mmk.cross_attention(q, k[:, :, p], v[:, :, p], return_lse=True) for p in parts]
        return mmk.merge_attention([out for out, _ in pairs], [lse for _, lse in pairs])

    results = []
    for attend in (merged, lambda q, k, v: mmk.cross_attention(q, k, v, return_lse=True)):
        out, lse = attend(q, k, v)
        grads = torch.autograd.grad(out.float().sin().sum() + lse.cos().sum(), (q, k, v))
        results.append([out, lse, *grads])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@each_dtype
def test_a_part_that_attends_to_nothing_is_not_read(garbage: float, dtype: torch.dtype, backend: str) -> None:
    outputs, lses = make(dtype, parts=3, absent=0.4)
    results = []
    for filler in (0.0, garbage):
        leaves = [
            x.detach().masked_fill(lse.detach()[..., None] == -torch.inf, filler).requires_grad_()
            for x, lse in zip(outputs, lses, strict=True)
        ]
        out, lse = mmk.merge_attention(leaves, lses)
        grads = torch.autograd.grad((out, lse), [*leaves, *lses], (torch.ones_like(out), torch.ones_like(lse)))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
        results.append([out, lse, *grads])
    assert agree(*results)


def test_results_take_the_memory_order_of_their_input(backend: str) -> None:
    (a, b), lses = make(shape=(2, 3, 5, 8))
    a = a.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out, lse = mmk.merge_attention([a, b], lses)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    grads = torch.autograd.grad(out.sum() + lse.sum(), [a, b, *lses])
    assert grads[0].transpose(1, 2).is_contiguous() and all(g.is_contiguous() for g in grads[1:])
    check_op(mmk.merge_attention, [a, b], lses, backend=backend)


def merged(*leaves: Tensor) -> Tensor:
    half = len(leaves) // 2
    out, lse = mmk.merge_attention(leaves[:half], leaves[half:])
    return torch.cat([out, lse[..., None].to(out.dtype)], -1)


def merged_leaves(batch: int = 2, rows: int = 7) -> list[Tensor]:
    outputs, lses = make(shape=(batch, 3, rows, 6))
    return [*outputs, *lses]


x, y = torch.zeros(2, 3, 8), torch.zeros(2, 3)
BAD: list[tuple[type[Exception], str, Any, Any]] = [
    (TypeError, "outputs: expected a list of tensors; got Tensor", x, [y]),
    (ValueError, "outputs: expected at least one tensor; got", [], []),
    (ValueError, "outputs[0]: expected at least 2 dims (*, L, D); got shape (8,)", [x[0, 0]], [y[0, 0]]),
    (ValueError, "lses: expected 1 tensors as in outputs; got 2", [x], [y, y]),
    (TypeError, "outputs[0]: expected dtype float32", [x.int()], [y]),
    (TypeError, "outputs[1]: expected the dtype of outputs[0], torch.float32", [x, x.half()], [y, y]),
    (ValueError, "outputs[1]: expected shape (2, 3, 8); got (2, 3, 7)", [x, x[..., 1:]], [y, y]),
    (TypeError, "lses[0]: expected dtype torch.float32; got torch.bfloat16", [x.bfloat16()], [y.bfloat16()]),
    (ValueError, "lses[1]: expected shape (2, 3); got (3,)", [x, x], [y, y[0]]),
    (RuntimeError, f"lses[0]: expected the device of outputs[0], {HERE}; got meta", [x], [y.to("meta")]),
]


@pytest.mark.parametrize(("error", "message", "outputs", "lses"), BAD, ids=[message[:45] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, outputs: Any, lses: Any
) -> None:
    with pytest.raises(error, match="^merge_attention: " + re.escape(message)):
        mmk.merge_attention(outputs, lses)
