"""tensor_fusion_linear on every backend and instruction set, and what torch asks of it."""

from __future__ import annotations

import math
from typing import Any

import op_contract as contract
import pytest
import torch
from conftest import FUZZED, use_implementation
from environment import HERE
from fusion_cases import each_dtype
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.tensor_fusion_linear import reference
from mmkernels.testing import check_op


def make(
    batch: int, widths: tuple[int, ...] = (5, 3, 4), outputs: int = 7, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The modalities, weight and bias, all of which require grad."""
    features = math.prod(width + 1 for width in widths)
    tensors = [*(torch.randn(batch, w) for w in widths), torch.randn(outputs, features) / features**0.5]
    return [t.to(dtype).requires_grad_() for t in (*tensors, torch.randn(outputs))]


def call(*leaves: Tensor) -> Tensor:
    *xs, weight, bias = leaves
    return mmk.tensor_fusion_linear(xs, weight, bias)


# batch, widths, outputs
CASES = {
    "one row": (1, (5, 3), 7),
    "one modality": (3, (11,), 5),
    "one modality, many rows": (70, (300,), 9),
    "rows beyond the few": (29, (6, 5), 20),
    "widths of whole vectors": (33, (16, 16), 24),
    "three modalities, several blocks of rows": (211, (7, 4, 9), 13),
    "five modalities": (18, (2, 1, 3, 2, 2), 6),
    "an empty modality": (9, (4, 0, 3), 5),
    "modalities all empty": (5, (0, 0), 3),
    "an entry's runs longer than a chunk": (20, (2, 400), 4),
    "few rows, several chunks": (2, (20, 70), 130),
    "rows beyond a chunk of the weight's gradient": (300, (3, 2), 2),
    "no rows": (0, (4, 3), 5),
    "no outputs": (6, (4, 3), 0),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_output_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    batch, widths, outputs = CASES[case]
    *xs, weight, bias = make(batch, widths, outputs, dtype)
    check_op(mmk.tensor_fusion_linear, xs, weight, bias, backend=backend)
    check_op(mmk.tensor_fusion_linear, xs, weight, backend=backend, grad=False)


def test_the_reference_is_the_sum_over_all_products() -> None:
    xs = [torch.randn(2, w, dtype=torch.float64) for w in (2, 1, 3)]
    weight, bias = torch.randn(4, 3 * 2 * 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    a, b, c = (torch.cat([torch.ones(2, 1, dtype=torch.float64), x], 1) for x in xs)
    expected = torch.einsum("nijk,bi,bj,bk->bn", weight.view(4, 3, 2, 4), a, b, c) + bias
    torch.testing.assert_close(reference.tensor_fusion_linear(xs, weight, bias), expected)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dims(lead: tuple[int, ...], backend: str) -> None:
    xs = [torch.randn(*lead, w, requires_grad=True) for w in (5, 4)]
    weight = torch.randn(3, 30, requires_grad=True)
    out = check_op(mmk.tensor_fusion_linear, xs, weight, backend=backend)
    assert out[0].shape == (*lead, 3)


def test_more_threads_than_blocks_of_rows_change_nothing(native_isa: str) -> None:
    contract.check_threads_and_runs_agree(call, make(40, (20, 30), 64))  # enough arithmetic to wake them


@fuzz(100)
@given(st.data())
def test_any_call_obeys_the_precision_rule(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = tuple(draw(st.lists(st.integers(0, 12), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    leaves = make(draw(st.integers(0, 120)), widths, draw(st.integers(1, 40)), dtype)
    *xs, weight, bias = (x.requires_grad_(draw(st.booleans())) for x in leaves)
    for backend in use_implementation(draw(st.sampled_from(FUZZED))):
        check_op(mmk.tensor_fusion_linear, xs, weight, draw(st.sampled_from((None, bias))), backend=backend)


x, w = torch.zeros(4, 2), torch.zeros(5, 9)
meta = torch.zeros(4, 2, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, r"xs: expected a list of tensors; got Tensor", (x, w)),
    (ValueError, r"xs: expected at least one tensor; got an empty list", ([], w)),
    (TypeError, r"xs\[1\]: expected a torch.Tensor; got int", ([x, 3], w)),
    (TypeError, r"xs\[0\]: expected dtype float32.*; got torch.int64", ([x.long(), x.long()], w)),
    (TypeError, r"xs\[1\]: expected the dtype of xs\[0\], torch.float32; got torch.float16", ([x, x.half()], w)),
    (RuntimeError, rf"xs\[1\]: expected the device of xs\[0\], {HERE}; got meta", ([x, meta], w)),
    (ValueError, r"xs\[1\]: expected shape \(4, .*\), the leading dims of xs\[0\]; got \(3, 2\)", ([x, x[:3]], w)),
    (TypeError, r"weight: expected a torch.Tensor; got NoneType", ([x, x], None)),
    (TypeError, r"weight: expected the dtype of xs\[0\], torch.float32; got torch.float64", ([x, x], w.double())),
    (ValueError, r"weight: expected shape \(N, 9\); got \(5, 8\)", ([x, x], w[:, :8])),
    (ValueError, r"bias: expected shape \(5,\); got \(4,\)", ([x, x], w, torch.zeros(4))),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[m[:40] for _, m, _ in BAD])
def test_bad_input(error: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match="^tensor_fusion_linear: " + message):
        mmk.tensor_fusion_linear(*arguments)
