"""norm_rotary on every backend and instruction set, inside torch, and against what models have."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from environment import DEVICE, HERE
from op_contract import check_threads_and_runs_agree
from row_ops import DTYPES, strided
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory


def make(
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 3,
    key_heads: int = 2,
    length: int = 5,
    features: int = 16,
    half: int | None = None,
    table: str = "L",
    packed: bool = False,
    table_dtype: torch.dtype | None = None,
    weights: str = "qk",
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """query, key, cos and sin, and the weights of the sides named, that all require grad; a letter of ``table`` per dim
    of cos before the last, 1 for a broadcast one."""
    half = features // 2 if half is None else half
    sizes = {"B": batch, "L": length, "1": 1}
    counts = (heads, key_heads)
    shapes = [(length, n, features) if packed else (batch, n, length, features) for n in counts]
    angle = torch.rand(*(sizes[d] for d in table), half) * 7
    cos, sin = (t.to(table_dtype or dtype) for t in (angle.cos(), angle.sin()))
    inputs = [*(torch.randn(s).to(dtype) for s in shapes), cos, sin]
    names = {"q": "query_weight", "k": "key_weight"}
    options = {names[side]: torch.randn(features).to(table_dtype or dtype).requires_grad_() for side in weights}
    return [t.requires_grad_() for t in inputs], options


SHAPES: dict[str, dict[str, Any]] = {
    "several tasks": dict(length=67, features=64),
    "a table for every batch element": dict(table="BL", length=35),
    "one table with a batch dim": dict(table="1L", batch=3),
    "packed": dict(packed=True, length=40, features=32),
    "some features": dict(features=40, half=8),
    "some features, whole vectors": dict(features=96, half=32, length=3),
    "rest of a vector": dict(features=72),
    "an odd number of features": dict(features=7, half=2),
    "nothing to rotate": dict(features=9, half=0),
    "one head, one token": dict(heads=1, key_heads=1, length=1, features=128),
    "no batch": dict(batch=0),
    "no tokens": dict(length=0),
    "no heads of keys": dict(key_heads=0),
    "no features": dict(features=0),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_order = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@pytest.mark.parametrize("shape", SHAPES)
@each_order
@each_dtype
def test_outputs_and_gradients_match_the_oracle(
    dtype: torch.dtype, interleaved: bool, shape: str, backend: str
) -> None:
    inputs, weights = make(dtype, **SHAPES[shape])
    with poisoned_memory():
        check_op(mmk.norm_rotary, *inputs, backend=backend, interleaved=interleaved, **weights)


@pytest.mark.parametrize("weights", ["", "q", "k"], ids=["neither", "queries", "keys"])
@each_order
def test_what_has_no_weight_is_not_normalised(interleaved: bool, weights: str, backend: str) -> None:
    for shape in (dict(features=64), dict(features=20, half=6, table="BL"), dict(packed=True)):
        inputs, options = make(weights=weights, **shape)
        check_op(mmk.norm_rotary, *inputs, backend=backend, interleaved=interleaved, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_order
def test_tables_and_weights_may_be_float32_beside_halves(interleaved: bool, dtype: torch.dtype, backend: str) -> None:
    inputs, weights = make(dtype, features=48, half=20, table="BL", table_dtype=torch.float32)
    check_op(mmk.norm_rotary, *inputs, backend=backend, interleaved=interleaved, **weights)
    grads = torch.autograd.grad(sum(x.float().sum() for x in mmk.norm_rotary(*inputs, **weights)), inputs)
    assert [g.dtype for g in grads] == [dtype, dtype, torch.float32, torch.float32]


def test_the_formulas_of_models(backend: str) -> None:
    """LLaMA's halves with tables of all features, FLUX's and GPT-J's neighbours, Qwen3's norm before."""
    (q, k, cos, sin), weights = make(length=9, features=32, table="BL")
    both = [torch.cat([t, t], -1).unsqueeze(1) for t in (cos, sin)]

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    got = mmk.norm_rotary(q, k, cos, sin)
    torch.testing.assert_close(got, tuple(x * both[0] + rotate_half(x) * both[1] for x in (q, k)))
    normed = [F.rms_norm(x, (32,), w, 0.1) for x, w in zip((q, k), weights.values(), strict=True)]
    got = mmk.norm_rotary(q, k, cos, sin, eps=0.1, **weights)
    torch.testing.assert_close(got, tuple(x * both[0] + rotate_half(x) * both[1] for x in normed))

    turn = torch.complex(cos, sin).unsqueeze(1)
    got = mmk.norm_rotary(q, k, cos, sin, interleaved=True)
    pairs = [torch.view_as_complex(x.unflatten(-1, (16, 2))) * turn for x in (q, k)]
    torch.testing.assert_close(got, tuple(torch.view_as_real(x).flatten(-2) for x in pairs))


def test_a_packed_batch_is_the_batch_without_padding(backend: str) -> None:
    (q, k, cos, sin), weights = make(batch=1, length=11)
    packed = mmk.norm_rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos, sin, **weights)
    whole = mmk.norm_rotary(q, k, cos, sin, **weights)
    for x, y in zip(packed, whole, strict=True):
        torch.testing.assert_close(x.transpose(0, 1)[None], y)


@each_order
def test_results_and_gradients_take_the_memory_order_of_their_input(interleaved: bool, backend: str) -> None:
    (q, k, cos, sin), weights = make(length=40, features=64)
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out, key_out = mmk.norm_rotary(q, k, cos, sin, interleaved=interleaved, **weights)
    assert out.transpose(1, 2).is_contiguous() and key_out.is_contiguous()
    grads = torch.autograd.grad(out.sum() + key_out.sum(), (q, k))
    assert grads[0].transpose(1, 2).is_contiguous() and grads[1].is_contiguous()
    check_op(mmk.norm_rotary, q, k, cos, sin, backend=backend, interleaved=interleaved, **weights)


def test_heads_within_one_projection_and_strided_tables(backend: str) -> None:
    joined = torch.randn(2, 9, 7, 16)
    q, k = (x.transpose(1, 2).requires_grad_() for x in joined.split((3, 4), 2))
    cos, sin = (torch.rand(9, 16).repeat_interleave(2, -1)[:, ::4].requires_grad_() for _ in range(2))
    check_op(mmk.norm_rotary, q, k, cos, sin, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        inputs, weights = make(dtype, length=9, table="BL")
        expected = mmk.norm_rotary(*inputs, **weights)
        arranged = {name: strided(w) for name, w in weights.items()}
        assert agree(mmk.norm_rotary(*(strided(x) for x in inputs), **arranged), expected)


def test_large_results_have_the_bits_of_small_ones(backend: str) -> None:
    """From some size on stores bypass the caches; a row is what it is beside few others."""
    for features, order in ((64, False), (64, True), (96, False)):
        (q, k, cos, sin), weights = make(heads=40, batch=1, length=260, features=features, half=32)
        whole = mmk.norm_rotary(q, k, cos, sin, interleaved=order, **weights)
        few = mmk.norm_rotary(q[:, :3], k[:, :1], cos, sin, interleaved=order, **weights)
        assert agree([whole[0][:, :3], whole[1][:, :1]], few)


@each_order
def test_rows_of_zeros_and_large_ones_stay_finite(interleaved: bool, backend: str) -> None:
    (q, k, cos, sin), weights = make()
    q.data[:, 0], k.data[:, 0] = 0.0, 1e15
    outs = mmk.norm_rotary(q, k, cos, sin, interleaved=interleaved, **weights)
    grads = torch.autograd.grad(outs, [q, k, cos, sin, *weights.values()], [torch.ones_like(x) for x in outs])
    assert all(x.isfinite().all() for x in (*outs, *grads))


def joined(*inputs: Tensor, **options: Any) -> Tensor:
    return torch.cat(mmk.norm_rotary(*inputs, **options), -3)


@pytest.mark.parametrize("table", ["L", "BL"])
def test_any_number_of_threads_gives_the_same_bits(table: str, native_isa: str) -> None:
    inputs, weights = make(length=200, batch=3, heads=6, features=64, table=table)
    check_threads_and_runs_agree(lambda *x: joined(*x[:4], query_weight=x[4]), [*inputs, weights["query_weight"]])


def test_autocast_keeps_the_wider_of_queries_and_keys_and_takes_tables_as_they_are(either_backend: str) -> None:
    (q, k, cos, sin), weights = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        for out in mmk.norm_rotary(q.bfloat16(), k.bfloat16(), cos, sin, **weights):
            assert out.dtype == torch.bfloat16
        assert mmk.norm_rotary(q.half(), k.half(), cos.bfloat16(), sin.bfloat16())[0].dtype == torch.float16
    expected = mmk.norm_rotary(q.bfloat16(), k.bfloat16(), cos, sin, **weights)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert agree(mmk.norm_rotary(q.bfloat16(), k.bfloat16(), cos, sin, **weights), expected)


q, k, t, w = torch.zeros(2, 4, 7, 8), torch.zeros(2, 2, 7, 8), torch.zeros(7, 4), torch.zeros(8)
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, "query: expected a torch.Tensor; got int", (3, k, t, t), {}),
    (ValueError, "query: expected 4 dims (B, H, L, D), or 3 of packed ones", (q[0, 0], k, t, t), {}),
    (TypeError, "query: expected dtype float32", (q.long(), k.long(), t, t), {}),
    (TypeError, "key: expected the dtype of query, torch.float32; got torch.bfloat16", (q, k.bfloat16(), t, t), {}),
    (RuntimeError, f"key: expected the device of query, {HERE}; got meta", (q, k.to("meta"), t, t), {}),
    (ValueError, "key: expected shape (2, Hk, 7, 8); got (2, 2, 7, 6)", (q, k[..., :6], t, t), {}),
    (ValueError, "key: expected shape (2, Hk, 7, 8); got (2, 2, 5, 8)", (q, k[:, :, :5], t, t), {}),
    (ValueError, "key: expected shape (4, Hk, 8); got (2, 2, 7, 8)", (q[0], k, t, t), {}),
    (ValueError, "cos: expected shape (7, R/2) or (2, 7, R/2), R at most 8; got (6, 4)", (q, k, t[:6], t[:6]), {}),
    (ValueError, "cos: expected shape (7, R/2) or (2, 7, R/2)", (q, k, torch.zeros(7, 8), torch.zeros(7, 8)), {}),
    (ValueError, "cos: expected shape (7, R/2) or (2, 7, R/2)", (q, k, torch.zeros(3, 7, 4), t), {}),
    (ValueError, "cos: expected shape (4, R/2), R at most 8", (q[0], q[0], torch.zeros(1, 4, 4), t), {}),
    (ValueError, "sin: expected the shape of cos, (7, 4); got (7, 3)", (q, k, t, t[:, :3]), {}),
    (TypeError, "cos: expected the dtype of query, torch.bfloat16, or", (q.bfloat16(), k.bfloat16(), t.half(), t), {}),
    (TypeError, "sin: expected the dtype of cos, torch.bfloat16", (q.bfloat16(), k.bfloat16(), t.bfloat16(), t), {}),
    (RuntimeError, "sin: expected the device of query", (q, k, t, t.to("meta")), {}),
    (ValueError, "query_weight: expected shape (8,); got (1, 8)", (q, k, t, t), {"query_weight": w[None]}),
    (ValueError, "key_weight: expected shape (8,); got (4,)", (q, k, t, t), {"key_weight": w[:4]}),
    (TypeError, "key_weight: expected the dtype of query", (q, k, t, t), {"key_weight": w.double()}),
    (TypeError, "key_weight: expected a torch.Tensor; got float", (q, k, t, t), {"key_weight": 1.0}),
    (TypeError, "eps: expected a number; got str", (q, k, t, t), {"eps": "1e-6"}),
    (TypeError, "interleaved: expected a bool; got int", (q, k, t, t), {"interleaved": 1}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match="^norm_rotary: " + re.escape(message)):
        mmk.norm_rotary(*inputs, **options)
