"""bilinear_fusion on every backend and instruction set, and what torch asks of it."""

from __future__ import annotations

import os
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
from mmkernels import _native
from mmkernels.ops.bilinear_fusion import reference
from mmkernels.testing import check_op


def make(
    batch: int, widths: tuple[int, int] = (5, 4), outputs: int = 3, rank: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Both modalities and their weights, all of which require grad."""
    weights = [torch.randn(outputs * rank, w) / max(w, 1) ** 0.5 for w in widths]
    return [t.to(dtype).requires_grad_() for t in (*(torch.randn(batch, w) for w in widths), *weights)]


# batch, widths, outputs, rank
CASES = {
    "one row": (1, (5, 3), 7, 1),
    "few rows, long features": (3, (1300, 40), 9, 3),
    "widths of whole vectors": (33, (16, 64), 24, 1),
    "several blocks of rows": (203, (7, 30), 10, 3),
    "several chunks of features": (40, (300, 130), 6, 2),
    "several blocks of outputs": (20, (9, 8), 150, 2),
    "a window longer than a block": (30, (5, 6), 2, 300),
    "an empty modality": (30, (0, 6), 5, 2),
    "an empty modality, few rows": (2, (4, 0), 5, 2),
    "no rows": (0, (4, 3), 5, 2),
    "no outputs": (6, (4, 3), 0, 2),
}


@pytest.mark.parametrize("case", CASES)
@each_dtype
def test_output_and_gradients(case: str, dtype: torch.dtype, backend: str) -> None:
    batch, widths, outputs, rank = CASES[case]
    check_op(mmk.bilinear_fusion, *make(batch, widths, outputs, rank, dtype), rank=rank, backend=backend)


def test_a_window_is_adjacent_rows_of_the_weights() -> None:
    x, y, u, v = (t.detach().double() for t in make(6, rank=3))
    forms = torch.einsum("njk,njl->nkl", u.view(3, 3, 5), v.view(3, 3, 4))  # [N, Kx, Ky], each of rank 3
    expected = torch.einsum("bk,nkl,bl->bn", x, forms, y)
    torch.testing.assert_close(reference.bilinear_fusion(x, y, u, v, 3), expected)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_dims_and_the_output_layer(lead: tuple[int, ...], backend: str) -> None:
    leaves = make(1)
    x, y = torch.randn(*lead, 5, requires_grad=True), torch.randn(*lead, 4, requires_grad=True)
    out_weight, out_bias = torch.randn(8, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    options = {"out_weight": out_weight, "out_bias": out_bias, "rank": 2}
    out = check_op(mmk.bilinear_fusion, x, y, *leaves[2:], **options, backend=backend)
    assert out[0].shape == (*lead, 8)
    z = mmk.bilinear_fusion(x, y, *leaves[2:], rank=2)
    torch.testing.assert_close(out[0], z @ out_weight.T + out_bias)


@pytest.mark.skipif(
    HERE != "cpu" or not _native.available() or "MMKERNELS_BACKEND" in os.environ, reason="compares with the kernels"
)
def test_large_bfloat16_products_with_nothing_to_pool_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "isa", lambda: "avx512_bf16")
    inputs = make(300, (900, 100), 24, 1, torch.bfloat16)
    out_weight = torch.randn(5, 24).bfloat16().requires_grad_()

    def explained(*inputs: Tensor, **options: Any) -> mmk.Explanation:
        return mmk.explain(mmk.bilinear_fusion, *inputs, out_weight=out_weight, **options)

    served = explained(*inputs)
    assert served.backend == "reference"
    assert served.reasons["cpu"] == "torch's bfloat16 products of this size are faster"
    presence = torch.ones(300, 2, dtype=torch.bool)
    few = explained(inputs[0][:200], inputs[1][:200], *inputs[2:])
    assert {few.backend, explained(*inputs, presence=presence).backend} == {"cpu"}
    with mmk.use_backend("cpu"):
        assert explained(*inputs).backend == "cpu"
        kernel = mmk.bilinear_fusion(*inputs, out_weight=out_weight)
    out = mmk.bilinear_fusion(*inputs, out_weight=out_weight)
    x, y, u, v = inputs
    torch.testing.assert_close(out, ((x @ u.mT) * (y @ v.mT)) @ out_weight.mT)
    torch.testing.assert_close(out, kernel, atol=0.1, rtol=0.02)
    for grad, expected in zip(
        torch.autograd.grad(out.sum(), (*inputs, out_weight)),
        torch.autograd.grad(kernel.sum(), (*inputs, out_weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected, atol=0.5, rtol=0.05)


@fuzz(100)
@given(st.data())
def test_any_call_obeys_the_precision_rule(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    widths = (draw(st.integers(0, 150)), draw(st.integers(0, 40)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    rank = draw(st.integers(1, 5))
    leaves = make(draw(st.integers(0, 120)), widths, draw(st.integers(1, 70)), rank, dtype)
    leaves = [x.requires_grad_(draw(st.booleans())) for x in leaves]
    for backend in use_implementation(draw(st.sampled_from(FUZZED))):
        check_op(mmk.bilinear_fusion, *leaves, rank=rank, backend=backend)


x, y, u, v = torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(6, 2), torch.zeros(6, 3)
meta = torch.zeros(4, 3, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, r"x: expected a torch.Tensor; got list", ([x], y, u, v), {}),
    (TypeError, r"x: expected dtype float32.*; got torch.int64", (x.long(), y, u, v), {}),
    (TypeError, r"y: expected the dtype of x, torch.float32; got torch.float16", (x, y.half(), u, v), {}),
    (RuntimeError, rf"y: expected the device of x, {HERE}; got meta", (x, meta, u, v), {}),
    (ValueError, r"y: expected shape \(4, Ky\), the leading dims of x; got \(3, 3\)", (x, y[:3], u, v), {}),
    (ValueError, r"x_weight: expected shape \(rank·N, 2\); got \(6, 3\)", (x, y, v, v), {}),
    (ValueError, r"x_weight: expected a multiple of rank, 4, rows; got 6 rows", (x, y, u, v), {"rank": 4}),
    (ValueError, r"y_weight: expected shape \(6, 3\); got \(5, 3\)", (x, y, u, v[:5]), {}),
    (TypeError, r"y_weight: expected a torch.Tensor; got NoneType", (x, y, u, None), {}),
    (TypeError, r"rank: expected an int; got float", (x, y, u, v), {"rank": 1.0}),
    (ValueError, r"rank: expected at least 1; got 0", (x, y, u, v), {"rank": 0}),
    (ValueError, r"out_weight: expected shape \(Nout, 3\); got \(6, 2\)", (x, y, u, v), {"out_weight": u, "rank": 2}),
    (ValueError, r"out_bias: expected None without out_weight; got a tensor", (x, y, u, v), {"out_bias": u[0]}),
    (
        ValueError,
        r"out_bias: expected shape \(6,\); got \(2,\)",
        (x, y, u[:2], v[:2]),
        dict(out_weight=u, out_bias=x[0]),
    ),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[m[:40] for _, m, *_ in BAD])
def test_bad_input(error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(error, match="^bilinear_fusion: " + message):
        mmk.bilinear_fusion(*inputs, **options)
