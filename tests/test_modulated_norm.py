"""modulated_norm on every backend and instruction set, and inside torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from environment import HERE
from row_ops import DTYPES
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory

NORMS = (None, "layer", "rms")
DTYPES_AND_NORMS = [
    pytest.param(dtype, norm, id=f"{str(dtype)[6:]} {norm}")
    for dtype, norm in (
        (torch.float32, "layer"),
        (torch.float32, "rms"),
        (torch.float32, None),
        (torch.bfloat16, "layer"),
        (torch.float16, "layer"),
    )
]


def make(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    length: int = 5,
    features: int = 37,
    shift: str = "BC",
    scale: str = "BC",
    offset: float = 0.0,
) -> list[Tensor]:
    """x, shift and scale that require grad; a letter of ``shift`` and ``scale`` per dim, 1 for a broadcast one."""
    sizes = {"B": batch, "L": length, "C": features, "1": 1}
    shapes = [(batch, length, features), *(tuple(sizes[d] for d in dims) for dims in (shift, scale))]
    x, s, c = (torch.randn(shape) for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in (x + offset, s, c)]


def affine(features: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(features).to(dtype).requires_grad_() for name in ("norm_weight", "norm_bias")}


SHAPES: dict[str, dict[str, Any]] = {
    "per batch element": dict(batch=3, length=67, features=40),
    "per token": dict(shift="BLC", scale="BLC", length=9),
    "shift per token, scale per batch element": dict(shift="BLC"),
    "broadcast over the batch": dict(shift="1C", scale="1LC"),
    "one feature": dict(features=1),
    "features below a vector": dict(features=3),
    "features beyond several rows at once": dict(batch=1, length=3, features=4099),
    "several tasks": dict(batch=2, length=300, features=16),
    "several tasks per token": dict(batch=1, length=150, features=19, shift="BLC", scale="BLC"),
    "one token": dict(length=1, shift="BLC"),
    "no batch": dict(batch=0),
    "no tokens": dict(length=0),
    "no features": dict(features=0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "norm"), DTYPES_AND_NORMS)
def test_outputs_and_gradients_match_the_oracle(dtype: torch.dtype, shape: str, norm: str | None, backend: str) -> None:
    inputs = make(dtype, **SHAPES[shape])
    options = affine(inputs[0].shape[2], dtype) if norm else {}
    with poisoned_memory():
        check_op(mmk.modulated_norm, *inputs, norm=norm, backend=backend, **options)


@pytest.mark.parametrize("weights", [(), ("norm_weight",), ("norm_bias",)], ids=["none", "weight", "bias"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_absent_weights_count_as_one_and_zero(weights: tuple[str, ...], norm: str, backend: str) -> None:
    options = {name: t for name, t in affine(37).items() if name in weights}
    check_op(mmk.modulated_norm, *make(), norm=norm, backend=backend, **options)
    check_op(mmk.modulated_norm, *make(shift="BLC", scale="BLC"), norm=norm, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_far_from_zero_costs_no_accuracy(dtype: torch.dtype, backend: str) -> None:
    check_op(mmk.modulated_norm, *make(dtype, features=768, offset=1e3), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_squares_taken_around_an_outlier_cost_no_accuracy(dtype: torch.dtype, backend: str) -> None:
    x, shift, scale = make(dtype, features=4000)
    x.data[..., 0] = 1e4
    check_op(mmk.modulated_norm, x, shift, scale, backend=backend)


def test_the_formula(backend: str) -> None:
    x, shift, scale = make()
    for norm in NORMS:
        centered = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        normed = x if norm is None else centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt()
        want = normed * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(mmk.modulated_norm(x, shift, scale, norm=norm, eps=0.1), want)


def test_infinite_features_without_a_norm_leave_gradients_finite(backend: str) -> None:
    x, shift, scale = make()
    x = torch.where(torch.arange(37) == 3, torch.inf, x.detach()).requires_grad_()
    (grad,) = torch.autograd.grad(mmk.modulated_norm(x, shift, scale, norm=None).sum(), x)
    torch.testing.assert_close(grad, (1 + scale)[:, None].expand_as(x))


x = torch.zeros(2, 7, 8)
c = torch.zeros(2, 8)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "x: expected a torch.Tensor; got int", (3, c, c), {}),
    (ValueError, "x: expected 3 dims (B, L, C); got shape (7, 8)", (x[0], c, c), {}),
    (TypeError, "x: expected dtype float32", (x.long(), c.long(), c.long()), {}),
    (TypeError, "shift: expected the dtype of x, torch.float32; got torch.bfloat16", (x, c.bfloat16(), c), {}),
    (RuntimeError, f"scale: expected the device of x, {HERE}; got meta", (x, c, c.to("meta")), {}),
    (ValueError, "shift: expected shape (2, 8) or (2, 7, 8)", (x, c[:, :5], c), {}),
    (ValueError, "scale: expected shape (2, 8) or (2, 7, 8)", (x, c, x[:, :3]), {}),
    (ValueError, "norm: expected None, 'layer' or 'rms'; got 'batch'", (x, c, c), {"norm": "batch"}),
    (ValueError, "norm_weight: expected None where norm=None", (x, c, c), {"norm": None, "norm_weight": c[0]}),
    (ValueError, "norm_weight: expected shape (8,); got (2, 8)", (x, c, c), {"norm_weight": c}),
    (TypeError, "norm_bias: expected the dtype of the tokens", (x, c, c), {"norm_bias": c[0].double()}),
    (TypeError, "eps: expected a number; got str", (x, c, c), {"eps": "1e-6"}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^modulated_norm: " + re.escape(message)):
        mmk.modulated_norm(*inputs, **options)
