"""concat_tokens on every backend and instruction set, and inside torch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from calls import flat, mapped
from environment import HERE
from row_ops import DTYPES
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import assert_close_to_oracle, check_op, poisoned_memory, same_bits

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
    lengths: tuple[int, ...] = (3, 1, 5),
    features: int = 37,
    offset: float = 0.0,
) -> list[Tensor]:
    xs = [torch.randn(batch, length, features) + offset for length in lengths]
    return [x.to(dtype).requires_grad_() for x in xs]


def embeddings(xs: list[Tensor], *, types: bool = True, positions: str | None = None) -> dict[str, Any]:
    """Type and position embeddings; a letter of ``positions`` per source, x where it has one."""
    dtype, features = xs[0].dtype, xs[0].shape[2]
    options: dict[str, Any] = {}
    if types:
        options["type_embedding"] = torch.randn(len(xs), features).to(dtype).requires_grad_()
    if positions is not None:
        tables = [torch.randn(x.shape[1], features).to(dtype).requires_grad_() for x in xs]
        options["position_embeddings"] = [t if p == "x" else None for t, p in zip(tables, positions, strict=True)]
    return options


def affine(xs: list[Tensor], norm: str | None) -> dict[str, Any]:
    names = ("norm_weight", "norm_bias") if norm else ()
    weights = {name: torch.randn(xs[0].shape[2]).to(xs[0].dtype).requires_grad_() for name in names}
    return {"norm": norm, **weights}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "types and positions": ({}, dict(positions="xxx")),
    "types alone": ({}, {}),
    "positions of some": ({}, dict(types=False, positions="x-x")),
    "nothing added": ({}, dict(types=False)),
    "one batch element": (dict(batch=1, lengths=(7, 200)), dict(positions="xx")),
    "batch beyond a task": (dict(batch=259, lengths=(2, 1), features=8), dict(positions="xx")),
    "five rows at a time": (dict(batch=5, lengths=(40, 9), features=64), dict(positions="x-")),
    "one feature": (dict(features=1), dict(positions="xxx")),
    "features beyond several rows at once": (dict(batch=1, lengths=(2, 1), features=4099), dict(positions="xx")),
    "one source": (dict(lengths=(6,)), dict(positions="x")),
    "a source without tokens": (dict(lengths=(0, 4, 0)), dict(positions="xxx")),
    "no tokens": (dict(lengths=(0, 0)), dict(positions="xx")),
    "no batch": (dict(batch=0), dict(positions="xxx")),
    "no features": (dict(features=0), dict(positions="xxx")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "norm"), DTYPES_AND_NORMS)
def test_outputs_and_gradients_match_the_oracle(dtype: torch.dtype, case: str, norm: str | None, backend: str) -> None:
    sizes, added = CASES[case]
    xs = make(dtype, **sizes)
    with poisoned_memory():
        check_op(mmk.concat_tokens, xs, backend=backend, **embeddings(xs, **added), **affine(xs, norm))


@pytest.mark.parametrize("weights", [(), ("norm_weight",), ("norm_bias",)], ids=["none", "weight", "bias"])
def test_absent_weights_count_as_one_and_zero(weights: tuple[str, ...], backend: str) -> None:
    xs = make()
    options = {n: x for n, x in affine(xs, "layer").items() if n in ("norm", *weights)}
    check_op(mmk.concat_tokens, xs, backend=backend, **embeddings(xs), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_far_from_zero_costs_no_accuracy(dtype: torch.dtype, backend: str) -> None:
    xs = make(dtype, features=768, offset=1e3)
    check_op(mmk.concat_tokens, xs, backend=backend, **embeddings(xs, positions="xxx"), **affine(xs, "layer"))


def test_the_formula(backend: str) -> None:
    xs = make()
    options = {**embeddings(xs, positions="xxx"), **affine(xs, "layer")}
    rows = []
    for i, x in enumerate(xs):
        for token, position in zip(x.unbind(1), options["position_embeddings"][i], strict=True):
            z = token + options["type_embedding"][i] + position
            normed = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            rows.append(normed * options["norm_weight"] + options["norm_bias"])
    torch.testing.assert_close(mmk.concat_tokens(xs, **options), torch.stack(rows, 1))


def test_with_nothing_added_and_no_norm_it_is_cat_bit_for_bit(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        xs = [x.detach() for x in make(dtype)]
        xs[0][0, 0, :3] = torch.tensor([-0.0, torch.inf, -torch.inf])
        assert same_bits([mmk.concat_tokens(xs)], [torch.cat(xs, 1)])


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_dtype(dtype: torch.dtype, out_dtype: torch.dtype, backend: str) -> None:
    if out_dtype == torch.float64 and backend != "reference":
        with pytest.raises(mmk.UnsupportedError, match=r"out_dtype float64|float32 is not among"):
            mmk.concat_tokens(make(dtype), out_dtype=out_dtype)
        return
    xs = make(dtype)
    inputs = {"xs": xs, **embeddings(xs), **affine(xs, "layer")}

    def results(dtype: torch.dtype | None, out_dtype: torch.dtype) -> list[Tensor]:
        arguments = mapped(inputs, lambda x: x.detach().to(dtype or x.dtype).requires_grad_())
        out = mmk.concat_tokens(**arguments, out_dtype=out_dtype)
        return [out, *torch.autograd.grad(out.double().sin().sum(), list(flat(list(arguments.values()))))]

    got = results(None, out_dtype)
    with mmk.use_backend("reference"):
        plain, exact = results(None, out_dtype), results(torch.float64, torch.float64)
    assert got[0].dtype == out_dtype
    eps = max(torch.finfo(t).eps for t in (dtype, out_dtype))
    for i, (ours, same, oracle) in enumerate(zip(got, plain, exact, strict=True)):
        assert_close_to_oracle(ours, same, oracle, name=f"tensor {i}", rounding=4 * eps)


x, y = torch.zeros(2, 3, 8), torch.zeros(2, 5, 8)
BAD: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
    (TypeError, "xs: expected a list of tensors; got Tensor", x, {}),
    (ValueError, "xs: expected at least one tensor; got none", [], {}),
    (TypeError, "xs[1]: expected a torch.Tensor; got int", [x, 3], {}),
    (ValueError, "xs[1]: expected 3 dims (B, L, C); got shape (5, 8)", [x, y[0]], {}),
    (ValueError, "xs[1]: expected shape (2, L, 8); got (1, 5, 8)", [x, y[:1]], {}),
    (ValueError, "xs[1]: expected shape (2, L, 8); got (2, 5, 7)", [x, y[..., 1:]], {}),
    (TypeError, "xs[1]: expected the dtype of xs[0], torch.float32; got torch.float16", [x, y.half()], {}),
    (RuntimeError, f"xs[1]: expected the device of xs[0], {HERE}; got meta", [x, y.to("meta")], {}),
    (TypeError, "xs[0]: expected dtype float32", [x.int()], {}),
    (ValueError, "type_embedding: expected shape (2, 8); got (3, 8)", [x, y], {"type_embedding": torch.zeros(3, 8)}),
    (TypeError, "position_embeddings: expected a list", [x, y], {"position_embeddings": x[0]}),
    (
        ValueError,
        "position_embeddings: expected 2 entries, one per modality; got 1",
        [x, y],
        {"position_embeddings": [None]},
    ),
    (
        ValueError,
        "position_embeddings[1]: expected shape (5, 8); got (3, 8)",
        [x, y],
        {"position_embeddings": [None, x[0]]},
    ),
    (ValueError, "norm: expected None, 'layer' or 'rms'; got 'l2'", [x], {"norm": "l2"}),
    (ValueError, "norm_bias: expected None where norm=None; got shape (8,)", [x], {"norm_bias": torch.zeros(8)}),
    (TypeError, "out_dtype: expected float32", [x], {"out_dtype": torch.int32}),
]


@pytest.mark.parametrize(("error", "message", "xs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, xs: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^concat_tokens: " + re.escape(message)):
        mmk.concat_tokens(xs, **options)
