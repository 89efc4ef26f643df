"""Odd arguments of the attention ops: integers and masks in any layout, numbers of any kind, sizes beyond counting."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from environment import DEVICE
from fusion_cases import each_dtype
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import same_bits

INTEGERS = (torch.int32, torch.int64)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts: strided, transposed, flipped, at an offset."""
    apart = torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]
    by_columns = x.mT.contiguous().mT if x.dim() == 2 else torch.stack([x] * 3, 1)[:, 1]
    flipped = x.flip(0).clone()[torch.arange(len(x) - 1, -1, -1)] if len(x) else x
    offset = torch.cat([x[:1], x])[1:] if len(x) else x
    return {"strided": apart, "by columns": by_columns, "flipped": flipped, "offset": offset}


def check_layouts(call: Callable[[Tensor], Any], values: Tensor, *, constant: Tensor | None = None) -> None:
    """The call gives the same bits for the values in any layout, and for a constant that is expanded."""
    want = _flat(call(values.contiguous()))
    for name, x in layouts(values).items():
        assert torch.equal(x, values), name
        assert same_bits(_flat(call(x)), want), name
    if constant is not None:
        expanded = constant.expand(values.shape)
        assert same_bits(_flat(call(expanded)), _flat(call(expanded.contiguous())))


def _flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in _flat(part)]


def _with_gradients(call: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    outs = _flat(call(*leaves))
    return [o.detach() for o in outs] + list(torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves))


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_key_lengths_in_any_layout(queries: int, dtype: torch.dtype, backend: str) -> None:
    q, k = torch.randn(3, 2, queries, 8), torch.randn(3, 2, 9, 8)
    lengths, one = torch.tensor([3, 0, 9], dtype=dtype), torch.tensor(5, dtype=dtype)
    check_layouts(
        lambda n: _with_gradients(lambda q, k: mmk.cross_attention(q, k, k, key_lengths=n), q, k), lengths, constant=one
    )
    check_layouts(lambda n: mmk.cross_attention(q, k, k, key_lengths=n), lengths, constant=one)
    check_layouts(
        lambda n: _with_gradients(lambda q, k: mmk.joint_attention([q], [k, k], [k, k], key_lengths=[n, None]), q, k),
        lengths,
        constant=one,
    )
    check_layouts(lambda n: mmk.joint_attention([q], [k, k], [k, k], key_lengths=[None, n]), lengths, constant=one)


def test_the_op_itself_takes_lengths_in_any_layout(native_isa: str) -> None:
    q, k = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 9, 8)
    op = torch.ops.mmkernels.cross_attention

    def call(n: Tensor) -> list[Tensor]:
        out, lse, stats = op(q, k, k, None, None, None, n, -1, -1, False, 0.0, 0.3, 0.0, None, False, True, True)
        return [out, *lse, stats]

    check_layouts(call, torch.tensor([3, 0, 9]), constant=torch.tensor(5))
    assert same_bits(call(torch.tensor([3, 0, 9], dtype=torch.int32)), call(torch.tensor([3, 0, 9])))

    def joint(n: Tensor) -> Any:
        none = [None, 0.3, 0.0, 0.0, None, False, True]
        return torch.ops.mmkernels.joint_attention([q], [k], [k], [n], [0], *none)

    check_layouts(joint, torch.tensor([3, 0, 9]), constant=torch.tensor(5))

    def dropped(state: Tensor) -> list[Tensor]:
        out, lse, stats = op(q, k, k, None, None, None, None, -1, -1, False, 0.0, 0.3, 0.5, state, False, True, True)
        return [out, *lse, stats]

    check_layouts(dropped, torch.tensor([12345, 678]), constant=torch.tensor(9))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_starts_in_any_layout(dtype: torch.dtype, backend: str) -> None:
    q, k = torch.randn(8, 2, 8), torch.randn(20, 2, 8)
    ends, of_keys = torch.tensor([0, 3, 3, 8], dtype=dtype), torch.tensor([0, 11, 13, 20], dtype=dtype)

    def call(q_ends: Tensor, k_ends: Tensor) -> list[Tensor]:
        return _with_gradients(lambda q, k: mmk.varlen_cross_attention(q, k, k, q_ends, k_ends, 5, 11), q, k)

    check_layouts(lambda x: call(x, of_keys), ends)
    check_layouts(lambda x: call(ends, x), of_keys)
    none = torch.zeros(1, dtype=dtype).expand(4)  # no rows at all
    assert mmk.varlen_cross_attention(q[:0], k[:0], k[:0], none, none, 0, 0).shape == (0, 2, 8)


def test_masks_and_biases_in_any_layout(backend: str) -> None:
    x, y = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 9, 8)
    real, yes = torch.rand(2, 9) < 0.5, torch.tensor(True)

    def both(mask: Tensor, of_y: bool) -> list[Tensor]:
        name = "y_mask" if of_y else "x_mask"
        given = {name: mask}
        return _with_gradients(
            lambda a, b: mmk.bidirectional_cross_attention(a, b, a, b, **given), *((x, y) if of_y else (y, x))
        )

    check_layouts(lambda mask: both(mask, True), real, constant=yes)
    check_layouts(lambda mask: both(mask, False), real, constant=yes)
    bias = torch.randn(2, 2)

    def joint(bias: Tensor) -> list[Tensor]:
        return _with_gradients(
            lambda x, y, b: mmk.joint_attention([x, y], [x, y], [x, y], stream_bias=b + 0 * bias), x, y, bias
        )

    check_layouts(joint, bias, constant=torch.tensor(0.5))
    check_layouts(lambda b: mmk.joint_attention([x, y], [x, y], [x, y], stream_bias=b), bias, constant=torch.zeros(()))
    lse = torch.randn(9, 7)
    parts = [torch.randn(9, 7, 4) for _ in range(2)]
    check_layouts(lambda a: mmk.merge_attention(parts, [a, lse]), torch.randn(9, 7), constant=torch.tensor(0.5))
    check_layouts(lambda a: mmk.merge_attention(parts, [a, a]), torch.randn(9, 7), constant=torch.tensor(0.5))


def test_a_stream_without_tokens_may_have_any_strides(backend: str) -> None:
    x, none = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 8, 0).mT
    streams = [x.clone().requires_grad_(), none.requires_grad_()]
    outs = mmk.joint_attention(streams, streams, streams)
    want = mmk.joint_attention([x], [x], [x])[0]
    torch.testing.assert_close(outs[0].detach(), want)
    grads = torch.autograd.grad(sum(o.sum() for o in outs), streams)
    assert [g.shape for g in grads] == [x.shape, none.shape]


# --- windows ----------------------------------------------------------------------------------------------------------

HUGE = (64, 10**6, 2**31 - 1, 2**31, 2**62, sys.maxsize, 2**63, 2**70)


@pytest.mark.parametrize("size", HUGE, ids=str)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("queries", [1, 20])
def test_a_window_beyond_the_lengths_is_unbounded(queries: int, alignment: Any, size: int, backend: str) -> None:
    q, k = torch.randn(2, 2, queries, 8), torch.randn(2, 2, 30, 8)
    lengths, ends, of_keys = torch.tensor([30, 11]), torch.tensor([0, queries]), torch.tensor([0, 30])
    longest = max(size, 30)

    def padded(q: Tensor, k: Tensor, window: Any) -> Tensor:
        return mmk.cross_attention(q, k, k, window=window, causal_alignment=alignment, key_lengths=lengths)

    def packed(q: Tensor, k: Tensor, window: Any) -> Tensor:
        rows = [x[0].transpose(0, 1) for x in (q, k, k)]
        options = dict(window=window, causal_alignment=alignment)
        return mmk.varlen_cross_attention(*rows, ends, of_keys, longest, longest, **options)

    for window, bounded in (((size, size), (-1, -1)), ((2, size), (2, -1)), ((size, 3), (-1, 3))):
        for call in (padded, packed):
            got, want = (_with_gradients(partial(call, window=w), q, k) for w in (window, bounded))
            torch.testing.assert_close(got, want)


def test_the_ops_themselves_take_any_window(native_isa: str) -> None:
    q, k = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 30, 8)
    tail = (0.0, 0.3, 0.0, None, False, False, False)
    for bottom_right in (False, True):
        got, want = (
            torch.ops.mmkernels.cross_attention(q, k, k, None, None, None, None, w, w, bottom_right, *tail)[0]
            for w in (sys.maxsize, -1)
        )
        torch.testing.assert_close(got, want)


def test_symbolic_windows_compile() -> None:
    q = torch.randn(1, 2, 12, 8)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def call(q: Tensor) -> Tensor:
        return mmk.cross_attention(q, q, q, window=(q.shape[2] // 4, 0))

    for n in (12, 9):
        torch.testing.assert_close(call(q[:, :, :n]), mmk.cross_attention(*[q[:, :, :n]] * 3, window=(n // 4, 0)))


# --- huge logits ------------------------------------------------------------------------------------------------------


def _huge(*shape: int, gain: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return (torch.randn(*shape, generator=generator) * gain).to(dtype)


def check_like_torch(call: Callable[..., Any], oracle: Callable[..., Any], *leaves: Tensor) -> None:
    """Finite, and what torch gives in float64 from the same numbers: one key has all the weight."""
    got = _with_gradients(call, *leaves)
    want = _with_gradients(oracle, *(x.double() for x in leaves))
    outs = len(got) - len(leaves)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.isfinite().all(), i
        if i < outs:
            torch.testing.assert_close(x.double(), y, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[-1].double(), want[-1], rtol=5e-2, atol=5e-2)  # of the values


@pytest.mark.parametrize("gain", [1e3, 1e5, 3e6, 1e12], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40, 200])
@pytest.mark.parametrize("keys", [1, 40, 300])
def test_finite_inputs_with_huge_logits(keys: int, queries: int, gain: float, backend: str) -> None:
    q, k, v = _huge(1, 2, queries, 64, gain=gain), _huge(1, 2, keys, 64, gain=gain), torch.randn(1, 2, keys, 64)
    check_like_torch(mmk.cross_attention, F.scaled_dot_product_attention, q, k, v)
    with torch.no_grad():
        torch.testing.assert_close(mmk.cross_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    half = keys // 2

    def joint(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        parts = [[x[:, :, :half], x[:, :, half:]] for x in (k, v)]
        return mmk.joint_attention([q], *parts, **options)[0]

    check_like_torch(joint, F.scaled_dot_product_attention, q, k, v)
    for bias in ([0.0, 0.5], [1e9, 0.0]):
        entries = torch.tensor([bias])
        mask = entries.repeat_interleave(torch.tensor([half, keys - half]), 1)
        for scale in (0.125, -0.125):

            def with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return joint(q, k, v, stream_bias=entries, scale=scale)  # noqa: B023

            def with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), scale=scale)  # noqa: B023

            check_like_torch(with_bias, with_mask, q, k, v)


@each_dtype
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_huge_on_one_side(sign: float, dtype: torch.dtype, backend: str) -> None:
    """All logits of some rows are far below, or far above, zero; others are small."""
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("the reference rounds its scores to the inputs' dtype")
    gain = 1e5 if dtype != torch.float16 else 6e4
    q, k = torch.full((1, 1, 40, 64), sign * gain), torch.full((1, 1, 50, 64), gain)
    q[:, :, ::2] = 0.01 / gain
    v = torch.randn(1, 1, 50, 64)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = mmk.cross_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(
        out, v.float().mean(2, keepdim=True).expand(1, 1, 40, 64).to(dtype), rtol=2e-2, atol=2e-2
    )
    want = torch.logsumexp(q.double() @ k.double().mT / 8, -1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("gain", [1e5, 3e6], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_huge_logits_of_every_kind(gain: float, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("the reference rounds its scores to the inputs' dtype")
    q, k, v = (_huge(1, 2, n, 64, gain=g, dtype=dtype) for n, g in ((40, gain), (70, gain), (70, 1.0)))

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        ends = torch.tensor([0, 40]), torch.tensor([0, 70])
        return mmk.varlen_cross_attention(*rows, *ends, 40, 70).transpose(0, 1)[None]

    check_like_torch(packed, F.scaled_dot_product_attention, q, k, v)
    masked = torch.rand(40, 70) < 0.7

    def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mmk.cross_attention(q, k, v, attn_mask=masked)

    check_like_torch(hidden, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, masked), q, k, v)
    x_value = torch.randn(1, 2, 40, 64, dtype=dtype)

    def sides(q: Tensor, k: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return mmk.bidirectional_cross_attention(q, k, x, y)

    def apart(q: Tensor, k: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return F.scaled_dot_product_attention(q, k, y), F.scaled_dot_product_attention(k, q, x)

    check_like_torch(sides, apart, q, k, x_value, v)
    check_like_torch(lambda k, q, y, x: sides(k, q, y, x), lambda k, q, y, x: apart(k, q, y, x), k, q, v, x_value)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_more_scores_than_can_be_counted_raise() -> None:
    x = torch.zeros(1, device=DEVICE)
    for rows, columns in ((2**32, 2**32), (2**33, 2**31), (2**40, 2**30)):
        q, k = x.expand(1, 1, rows, 1), x.expand(1, 1, columns, 1)
        calls: dict[str, Callable[[], Any]] = {
            "cross_attention": lambda q=q, k=k: mmk.cross_attention(q, k, k),
            "scaled_dot_product_attention": lambda q=q, k=k: mmk.scaled_dot_product_attention(q, k, k),
            "joint_attention": lambda q=q, k=k: mmk.joint_attention([q], [k], [k]),
            "bidirectional_cross_attention": lambda q=q, k=k: mmk.bidirectional_cross_attention(q, k, q, k),
            "varlen_cross_attention": lambda q=q, k=k, r=rows, c=columns: mmk.varlen_cross_attention(
                q[0].transpose(0, 1), *[k[0].transpose(0, 1)] * 2, torch.tensor([0, r]), torch.tensor([0, c]), r, c
            ),
        }
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name}: \w+: expected fewer than 2\*\*63 scores; got "):
                call()


# --- numbers ----------------------------------------------------------------------------------------------------------

q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
ends = torch.tensor([0, 5]), torch.tensor([0, 7])
packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, k)]
WITH_SCALE: dict[str, Callable[..., Any]] = {
    "cross_attention": lambda **o: mmk.cross_attention(q, k, k, **o),
    "scaled_dot_product_attention": lambda **o: mmk.scaled_dot_product_attention(q, k, k, **o),
    "joint_attention": lambda **o: mmk.joint_attention([q], [k, k], [k, k], **o),
    "varlen_cross_attention": lambda **o: mmk.varlen_cross_attention(*packed, *ends, 5, 7, **o),
    "bidirectional_cross_attention": lambda **o: mmk.bidirectional_cross_attention(q, k, q, k, **o),
    "multiplicative_attention_pool": lambda **o: mmk.multiplicative_attention_pool(q[0], q[0, :, 0], **o),
}
HALF = (0.5, np.float32(0.5), np.float64(0.5), np.float16(0.5), torch.tensor(0.5), torch.tensor(0.5).double())
TWO = (2, 2.0, np.int64(2), np.int32(2), np.uint8(2), torch.tensor(2), np.float32(2))


@pytest.mark.parametrize("op", WITH_SCALE)
def test_numbers_of_numpy_and_of_tensors(op: str, backend: str) -> None:
    call = WITH_SCALE[op]
    for numbers in (HALF, TWO):
        want = _flat(call(scale=float(numbers[0])))
        for number in numbers:
            assert same_bits(_flat(call(scale=number)), want), repr(number)
    for wrong, got in ((True, "bool"), (np.bool_(True), "bool"), ("1", "str"), (1j, "complex")):
        with pytest.raises(TypeError, match=rf"^{op}: scale: expected a number; got {got}"):
            call(scale=wrong)
    for tensor in (torch.tensor(True), torch.ones(1), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(TypeError, match=rf"^{op}: scale: expected a number, or a real tensor without dims; got a"):
            call(scale=tensor)


@pytest.mark.parametrize("op", ["cross_attention", "joint_attention", "varlen_cross_attention"])
def test_softcap_of_numpy_and_of_tensors(op: str, backend: str) -> None:
    want = _flat(WITH_SCALE[op](softcap=2.0))
    for number in TWO:
        assert same_bits(_flat(WITH_SCALE[op](softcap=number)), want), repr(number)
    for zero in (0, np.float32(0), torch.tensor(0.0)):
        assert same_bits(_flat(WITH_SCALE[op](softcap=zero)), _flat(WITH_SCALE[op]()))
    with pytest.raises(TypeError, match=rf"^{op}: softcap: expected a number; got bool"):
        WITH_SCALE[op](softcap=True)


@pytest.mark.parametrize("op", ["cross_attention", "scaled_dot_product_attention", "joint_attention"])
def test_dropout_of_numpy_and_of_tensors(op: str, either_backend: str) -> None:
    def drawn(p: Any) -> list[Tensor]:
        torch.manual_seed(3)
        return _flat(WITH_SCALE[op](dropout_p=p))

    for p in HALF:
        assert same_bits(drawn(p), drawn(0.5)), repr(p)
    for none in (0, np.float32(0), torch.tensor(0.0)):
        assert same_bits(drawn(none), drawn(0.0))
    with pytest.raises(TypeError, match=rf"^{op}: dropout_p: expected a number; got bool"):
        drawn(False)
    with pytest.raises(ValueError, match=rf"^{op}: dropout_p: expected a probability"):
        drawn(np.float32(1.5))


def test_numbers_of_other_ops(backend: str) -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 8)
    tokens, shift = torch.randn(2, 3, 4), torch.randn(2, 4)
    calls = {
        "concat_norm_linear": lambda eps: mmk.concat_norm_linear([x, x], torch.ones(8), None, w, eps=eps),
        "concat_tokens": lambda eps: mmk.concat_tokens([tokens, tokens], norm="rms", eps=eps),
        "modulated_norm": lambda eps: mmk.modulated_norm(tokens, shift, shift, eps=eps),
    }
    for op, call in calls.items():
        for eps in HALF:
            assert same_bits([call(eps)], [call(0.5)]), (op, repr(eps))
        with pytest.raises(TypeError, match=rf"^{op}: eps: expected a number; got bool"):
            call(True)


def test_sizes_of_numpy(backend: str) -> None:
    want = mmk.varlen_cross_attention(*packed, *ends, 5, 7, window=(2, 1))
    for kind in (np.int64, np.int32, np.uint8, torch.tensor):
        got = mmk.varlen_cross_attention(*packed, *ends, kind(5), kind(7), window=(kind(2), kind(1)))
        assert same_bits([got], [want]), kind
        got = mmk.cross_attention(q, k, k, window=[kind(2), kind(1)])
        assert same_bits([got], [mmk.cross_attention(q, k, k, window=(2, 1))])
    for wrong in (True, np.bool_(True), torch.tensor(True), 1.0, np.float32(1)):
        with pytest.raises(TypeError, match=r"^varlen_cross_attention: max_seqlen_q: expected an int; got "):
            mmk.varlen_cross_attention(*packed, *ends, wrong, 7)
        with pytest.raises(TypeError, match=r"^cross_attention: window: expected a pair"):
            mmk.cross_attention(q, k, k, window=(wrong, 1))


def test_a_scale_of_another_kind_works_inside_torch() -> None:
    leaves = [x.clone().requires_grad_() for x in (q, k, k)]
    got, want = (
        torch.autograd.grad(mmk.cross_attention(*leaves, scale=s).sin().sum(), leaves) for s in (np.float32(0.25), 0.25)
    )
    assert same_bits(got, want)
    compiled = torch.compile(lambda q: mmk.cross_attention(q, q, q, scale=0.25), fullgraph=True, backend="eager")
    assert same_bits([compiled(q)], [mmk.cross_attention(q, q, q, scale=0.25)])


# --- tensors that are not dense ---------------------------------------------------------------------------------------


def _other(layout: str, *shape: int) -> Tensor:
    x = torch.randn(shape)
    return {"sparse_coo": x.to_sparse, "_mkldnn": x.to_mkldnn}[layout]()


@pytest.mark.skipif(DEVICE != "cpu", reason="MKL-DNN tensors are on the CPU")
@pytest.mark.parametrize("layout", ["sparse_coo", "_mkldnn"])
def test_tensors_without_strides_are_refused_by_name(layout: str) -> None:
    def refused(op: str, argument: str, call: Callable[[], Any]) -> None:
        message = f"{op}: {argument}: expected a dense tensor, of layout torch.strided; got a torch.{layout} tensor"
        with pytest.raises(TypeError, match=r"^" + re.escape(message)):
            call()

    bad, x = _other(layout, 1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    refused("cross_attention", "query", lambda: mmk.cross_attention(bad, x, x))
    refused("cross_attention", "value", lambda: mmk.cross_attention(x, x, bad))
    refused("cross_attention", "attn_mask", lambda: mmk.cross_attention(x, x, x, attn_mask=_other(layout, 5, 5)))
    refused("scaled_dot_product_attention", "key", lambda: mmk.scaled_dot_product_attention(x, bad, x))
    refused("joint_attention", "keys[1]", lambda: mmk.joint_attention([x], [x, bad], [x, x]))
    refused("joint_attention", "queries[0]", lambda: mmk.joint_attention([bad], [x], [x]))
    refused("bidirectional_cross_attention", "y_key", lambda: mmk.bidirectional_cross_attention(x, bad, x, x))
    refused("merge_attention", "outputs[1]", lambda: mmk.merge_attention([x, bad], [x[..., 0]] * 2))
    row, weight = torch.randn(3, 4), torch.randn(5, 8)
    refused("concat_linear", "xs[1]", lambda: mmk.concat_linear([row, _other(layout, 3, 4)], weight))
    refused("concat_linear", "xs[0]", lambda: mmk.concat_linear([_other(layout, 3, 4), row], weight))
    refused("concat_linear", "weight", lambda: mmk.concat_linear([row, row], _other(layout, 5, 8)))
    norm = (torch.ones(8), None)
    refused("concat_norm_linear", "weight", lambda: mmk.concat_norm_linear([row, row], *norm, _other(layout, 5, 8)))
    tokens = torch.randn(2, 3, 4)
    refused("concat_tokens", "xs[1]", lambda: mmk.concat_tokens([tokens, _other(layout, 2, 3, 4)]))
    refused("modulated_norm", "shift", lambda: mmk.modulated_norm(tokens, _other(layout, 2, 4), torch.randn(2, 4)))
    refused("gated_concat", "weight", lambda: mmk.gated_concat(row, row, _other(layout, 4, 8)))


def test_a_nested_tensor_of_the_strided_layout_gets_what_torch_gives() -> None:
    parts = [torch.randn(2, n, 8) for n in (3, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.strided)
    for options in ({}, {"scale": 0.3}, {"scale": np.float32(0.3)}):
        got = mmk.scaled_dot_product_attention(nested, nested, nested, **options)
        want = [F.scaled_dot_product_attention(x, x, x, **options) for x in parts]
        torch.testing.assert_close(list(got.unbind()), want)
    with pytest.raises(TypeError, match=r"^cross_attention: query: expected a dense tensor.*got a nested tensor"):
        mmk.cross_attention(nested, nested, nested)
