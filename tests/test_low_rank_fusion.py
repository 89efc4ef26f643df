"""low_rank_fusion on every backend and instruction set, and what torch asks of it."""

from __future__ import annotations

from typing import Any

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
from mmkernels.ops.low_rank_fusion import reference
from mmkernels.testing import check_op


def make(
    batch: int,
    widths: tuple[int, ...] = (5, 3, 4),
    outputs: int = 7,
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The modalities, their factors, rank weights and bias, all of which require grad."""
    factors = [torch.randn(rank, w + 1, outputs) / (w + 1) ** 0.5 for w in widths]
    tensors = [*(torch.randn(batch, w) for w in widths), *factors, torch.randn(rank), torch.randn(outputs)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def arguments(leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    count = len(leaves) // 2 - 1
    return leaves[:count], leaves[count : 2 * count], leaves[-2], leaves[-1]


# batch, widths, outputs, rank
CASES = {
    "one row": (1, (5, 3), 7, 3),
    "two rows": (2, (5, 3), 16, 3),
    "one modality": (9, (11,), 5, 4),
    "widths and outputs of whole vectors": (33, (16, 32), 32, 2),
    "several blocks of rows and of outputs": (203, (7, 4), 150, 2),
    "outputs so many that blocks of rows are short": (50, (3, 2, 4), 600, 2),
    "five modalities": (18, (2, 1, 3, 2, 2), 6, 2),
    "an empty modality": (9, (4, 0, 3), 5, 2),
    "modalities all empty": (5, (0, 0), 3, 2),
    "rank 1": (20, (6, 7), 10, 1),
    "rank 0": (4, (6, 7), 10, 0),
    "no rows": (0, (4, 3), 5, 2),
    "no outputs": (6, (4, 3), 0, 2),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_output_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    batch, widths, outputs, rank = CASES[case]
    xs, factors, rank_weights, bias = arguments(make(batch, widths, outputs, rank, dtype))
    check_op(mmk.low_rank_fusion, xs, factors, rank_weights, bias, backend=backend)
    check_op(mmk.low_rank_fusion, xs, factors, rank_weights, backend=backend, grad=False)


def test_it_is_tensor_fusion_with_a_weight_of_low_rank() -> None:
    xs, factors, rank_weights, bias = arguments([t.detach().double() for t in make(4)])
    weight = torch.einsum("r,rin,rjn,rkn->nijk", rank_weights, *factors).flatten(1)
    expected = mmk.tensor_fusion_linear(xs, weight, bias)
    torch.testing.assert_close(reference.low_rank_fusion(xs, factors, rank_weights, bias), expected)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dims_and_row_vectors(lead: tuple[int, ...], backend: str) -> None:
    xs = [torch.randn(*lead, w, requires_grad=True) for w in (5, 4)]
    factors = [torch.randn(3, w + 1, 6, requires_grad=True) for w in (5, 4)]
    rank_weights, bias = torch.randn(1, 3, requires_grad=True), torch.randn(1, 6, requires_grad=True)
    out = check_op(mmk.low_rank_fusion, xs, factors, rank_weights, bias, backend=backend)
    assert out[0].shape == (*lead, 6)


@fuzz(100)
@given(st.data())
def test_any_call_obeys_the_precision_rule(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    leaves = make(draw(st.integers(0, 120)), widths, draw(st.integers(1, 70)), draw(st.integers(1, 4)), dtype)
    xs, factors, weights, bias = arguments([x.requires_grad_(draw(st.booleans())) for x in leaves])
    for backend in use_implementation(draw(st.sampled_from(FUZZED))):
        check_op(mmk.low_rank_fusion, xs, factors, weights, draw(st.sampled_from((None, bias))), backend=backend)


x, f, r = torch.zeros(4, 2), torch.zeros(5, 3, 6), torch.zeros(5)
meta = torch.zeros(5, 3, 6, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
    (TypeError, r"xs: expected a list of tensors; got Tensor", (x, [f], r)),
    (ValueError, r"xs: expected at least one tensor; got an empty list", ([], [], r)),
    (TypeError, r"xs\[1\]: expected the dtype of xs\[0\], torch.float32; got .*float16", ([x, x.half()], [f, f], r)),
    (ValueError, r"xs\[1\]: .*, the leading dims of xs\[0\]; got \(3, 2\)", ([x, x[:3]], [f, f], r)),
    (TypeError, r"factors: expected a list of tensors; got Tensor", ([x, x], f, r)),
    (ValueError, r"factors: expected one per modality, 2; got 1", ([x, x], [f], r)),
    (TypeError, r"factors\[1\]: expected a torch.Tensor; got NoneType", ([x, x], [f, None], r)),
    (TypeError, r"factors\[0\]: expected the dtype of xs\[0\], .*; got torch.float64", ([x], [f.double()], r)),
    (RuntimeError, rf"factors\[0\]: expected the device of xs\[0\], {HERE}; got meta", ([x], [meta], r)),
    (ValueError, r"factors\[0\]: expected shape \(R, 3, N\); got \(3, 6\)", ([x], [f[0]], r)),
    (ValueError, r"factors\[0\]: expected shape \(5, 3, 6\); got \(5, 2, 6\)", ([x], [f[:, :2]], r)),
    (ValueError, r"factors\[1\]: expected shape \(5, 3, 6\); got \(4, 3, 6\)", ([x, x], [f, f[:4]], r)),
    (ValueError, r"rank_weights: expected shape \(5,\) or \(1, 5\); got \(4,\)", ([x], [f], r[:4])),
    (TypeError, r"rank_weights: expected a torch.Tensor; got float", ([x], [f], 1.0)),
    (ValueError, r"bias: expected shape \(6,\) or \(1, 6\); got \(5,\)", ([x], [f], r, r)),
]


@pytest.mark.parametrize(("error", "message", "inputs"), BAD, ids=[m[:40] for _, m, _ in BAD])
def test_bad_input(error: type[Exception], message: str, inputs: tuple[Any, ...]) -> None:
    with pytest.raises(error, match="^low_rank_fusion: " + message):
        mmk.low_rank_fusion(*inputs)
