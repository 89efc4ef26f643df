"""cross_attention inside torch: opcheck, compile, export, transforms, autocast, checkpoint, gradcheck, bad input."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from environment import DEVICE, HERE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkernels as mmk
from mmkernels import _native
from mmkernels.ops.cross_attention.op import cross_attention_op


def make(query_len: int = 7, key_len: int = 9, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    lengths = (query_len, key_len, key_len)
    return [torch.randn(2, 4, length, 8, dtype=dtype, requires_grad=True) for length in lengths]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A call with every kind of option but dropout."""
    lengths = torch.tensor([9, 4], device=q.device)
    options: dict[str, Any] = dict(is_causal=True, window=(5, -1), softcap=3.0, return_lse=True)
    return mmk.cross_attention(q, k, v, attn_mask=mask, key_lengths=lengths, **options)


def mask_with_grad() -> Tensor:
    return torch.randn(1, 4, 1, 9, requires_grad=True)


OPCHECKS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "masks and lse": lambda: (
        *(*make(), mask_with_grad(), None, None, torch.tensor([9, 4])),
        *(5, 0, False, 3.0, 0.3, 0.0, None, False, True, True),
    ),
    "gradient without what it wants saved": lambda: (
        *(*make(), mask_with_grad(), None, None, None),
        *(-1, -1, False, 0.0, 0.3, 0.0, None, False, False, False),
    ),
    "dropout": lambda: (
        *(*make(), None, None, None, None),
        *(-1, -1, False, 0.0, 0.3, 0.2, torch.tensor([3, 4]), False, False, True),
    ),
    "transposed, no gradient": lambda: (
        *(x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in make()),
        *(None, None, None, None, -1, 0, True, 0.0, None, 0.0, None, False, False, False),
    ),
    "last dim strided": lambda: (
        *(x.detach().repeat_interleave(2, 3)[..., ::2] for x in make()),
        *(None, None, None, None, -1, -1, False, 0.0, 0.3, 0.0, None, False, True, False),
    ),
    "mask of two dims": lambda: (
        *(*make(), torch.randn(1, 9, requires_grad=True), None, None, None),
        *(-1, -1, False, 0.0, 0.3, 0.0, None, False, False, True),
    ),
}


@pytest.mark.parametrize("arguments", OPCHECKS)
def test_opcheck_of_the_forward(arguments: str) -> None:
    torch.library.opcheck(torch.ops.mmkernels.cross_attention.default, OPCHECKS[arguments]())


def test_inductor_compiles_dropout_the_drop_in_and_transposed_inputs(backend: str) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        dropped = mmk.cross_attention(q, k, v, dropout_p=0.5)
        return dropped + mmk.scaled_dot_product_attention(q + 1, k, v).transpose(1, 2).contiguous().transpose(1, 2)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True)
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in make()]
    first, second = compiled(*leaves), compiled(*leaves)
    assert first.shape == (2, 4, 7, 8)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("strict", [False, True], ids=["by tracing", "strict"])
def test_export_with_dynamic_lengths(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return mmk.cross_attention(q, k, v, is_causal=True)

    dim = torch.export.Dim
    keys = {0: dim("batch"), 2: dim("keys")}
    shapes = ({0: dim("batch"), 2: dim("queries")}, keys, keys)
    inputs = tuple(x.detach() for x in make())
    exported = torch.export.export(Model(), inputs, dynamic_shapes=shapes, strict=strict).module()
    q, k = torch.randn(3, 4, 11, 8), torch.randn(3, 4, 5, 8)
    assert torch.equal(exported(q, k, k), Model()(q, k, k))


@pytest.mark.parametrize("mapped", [(0, None, None, None), (0, 0, 0, 0), (1, None, 0, 0), (None, 0, 0, None)], ids=str)
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_vmap_of_the_gradient_equals_a_loop(mapped: tuple[int | None, ...], mask_batch: int, backend: str) -> None:
    shapes = [(2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8), (mask_batch, 4, 1, 9)]
    inputs = [torch.randn(s if d is None else (*s[:d], 3, *s[d:])) for s, d in zip(shapes, mapped, strict=True)]

    def gradients(*x: Tensor) -> tuple[Tensor, ...]:
        def loss(*x: Tensor) -> Tensor:
            out, lse = masked(*x)
            return out.sin().sum() + lse.sum()

        return torch.func.grad(loss, argnums=(0, 1, 2, 3))(*x)

    got = torch.vmap(gradients, in_dims=mapped)(*inputs)
    pairs = list(zip(inputs, mapped, strict=True))
    examples = [gradients(*(x if d is None else x.select(d, i) for x, d in pairs)) for i in range(3)]
    for batched, one_by_one in zip(got, zip(*examples, strict=True), strict=False):
        torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)


def test_vmap_draws_dropout_as_its_randomness_says(backend: str) -> None:
    x = torch.ones(3, 2, 4, 7, 8)

    def dropped(x: Tensor) -> Tensor:
        return mmk.cross_attention(x, x, torch.eye(7, 8).expand(2, 4, 7, 8), dropout_p=0.5)

    same = torch.vmap(dropped, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(dropped, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_func_second_derivatives_compose() -> None:
    q, k = (x.detach().double() for x in make(3, 4)[:2])

    def loss(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda q: attend(q, k, k).sin().sum()

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / math.sqrt(8)).softmax(-1) @ v

    ours = torch.func.jacrev(torch.func.grad(loss(mmk.cross_attention)))(q)
    torch.testing.assert_close(ours, torch.func.jacrev(torch.func.grad(loss(plain)))(q))


def test_autocast_casts_as_torch_does(backend: str) -> None:
    leaves = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = mmk.cross_attention(*leaves)
        torchs = F.scaled_dot_product_attention(*leaves)
        mixed = mmk.scaled_dot_product_attention(leaves[0].bfloat16(), *leaves[1:], attn_mask=mask_with_grad())
    assert ours.dtype == torchs.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours.sum(), leaves))
    with mmk.use_backend("reference"), torch.autocast(DEVICE, torch.bfloat16):
        assert mmk.cross_attention(*(x.double() for x in leaves)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_dropout(reentrant: bool, backend: str) -> None:
    leaves = make()

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        for x in leaves:
            x.grad = None
        torch.manual_seed(3)
        attend(*leaves).square().sum().backward()
        return [x.grad for x in leaves if x.grad is not None]

    def attend(*x: Tensor) -> Tensor:
        return mmk.cross_attention(*x, dropout_p=0.3)

    assert agree(run(attend), run(lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)))


def test_other_devices_and_subclasses_go_through_the_registered_op() -> None:
    q = torch.empty(2, 4, 7, 8, device="meta")
    assert mmk.cross_attention(q, q, q).shape == q.shape
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 7, 4, 8).transpose(1, 2)
        assert mmk.cross_attention(q, q, q).stride() == q.stride()


# --- the drop-in ------------------------------------------------------------------------------------------------------

DROP_IN: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "2 dims": ((5, 8), (6, 8), None),
    "2 dims, mask": ((5, 8), (6, 8), (5, 6)),
    "3 dims": ((3, 5, 8), (3, 6, 8), (3, 5, 6)),
    "3 dims, one mask for all": ((3, 5, 8), (3, 6, 8), (1, 6)),
    "4 dims": ((2, 3, 5, 8), (2, 3, 6, 8), (3, 1, 6)),
    "4 dims, keys shared by the batch": ((2, 3, 5, 8), (1, 3, 6, 8), (2, 1, 5, 6)),
    "4 dims, keys shared by the heads": ((2, 3, 5, 8), (2, 1, 6, 8), None),
    "5 dims": ((2, 3, 4, 5, 8), (2, 3, 4, 6, 8), (2, 1, 1, 5, 6)),
    "5 dims, broadcast keys": ((2, 3, 4, 5, 8), (2, 1, 4, 6, 8), (3, 4, 1, 6)),
    "5 dims, broadcast queries": ((1, 1, 4, 5, 8), (2, 3, 4, 6, 8), (1, 6)),
    "6 dims": ((2, 1, 3, 4, 5, 8), (2, 1, 3, 4, 6, 8), (5, 6)),
    "empty batch": ((0, 3, 5, 8), (0, 3, 6, 8), None),
    "empty 5 dims": ((2, 0, 3, 5, 8), (2, 0, 3, 6, 8), (2, 0, 3, 5, 6)),
}


@pytest.mark.parametrize("case", DROP_IN)
def test_the_drop_in_takes_the_leading_dims_that_torch_takes(case: str, backend: str) -> None:
    q_shape, k_shape, m_shape = DROP_IN[case]
    q, k = torch.randn(q_shape, requires_grad=True), torch.randn(k_shape, requires_grad=True)
    mask = None if m_shape is None else torch.randn(m_shape, requires_grad=True)
    leaves = [x for x in (q, k, mask) if x is not None]
    results = []
    for attend in (mmk.scaled_dot_product_attention, F.scaled_dot_product_attention):
        lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
        wide = [x.expand(*lead, *x.shape[-2:]) for x in (q, k)] if attend is F.scaled_dot_product_attention else [q, k]
        out = attend(wide[0], wide[1], wide[1], attn_mask=mask)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_drop_in_groups_heads_with_more_leading_dims(backend: str) -> None:
    q, k = torch.randn(2, 3, 4, 5, 8), torch.randn(2, 1, 2, 6, 8)
    got = mmk.scaled_dot_product_attention(q, k, k, enable_gqa=True, is_causal=True)
    wide = k.repeat_interleave(2, 2).expand(2, 3, 4, 6, 8)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, wide, wide, is_causal=True))


# --- bad input --------------------------------------------------------------------------------------------------------


short_way = pytest.mark.skipif(
    not _native.available() or "MMKERNELS_BACKEND" in os.environ, reason="no native library, or a backend is forced"
)


def plain_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = ((2, 4, 9, 16), (2, 4, 21, 16), (2, 4, 21, 24))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


# Every option but dropout, whose bits are drawn in Python.
SHORT: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": dict(scale=0.3),
    "bool mask": dict(attn_mask=torch.arange(21)[None] % 3 > 0),
    "mask for each batch element": dict(attn_mask=torch.randn(2, 1, 1, 21)),
    "float mask of two dims": dict(attn_mask=torch.randn(9, 21)),
    "expanded mask": dict(attn_mask=torch.randn(2, 1, 9, 1).expand(2, 4, 9, 21)),
    "mask and bias": dict(attn_mask=torch.arange(21)[None] % 3 > 0, attn_bias=torch.randn(4, 9, 21)),
    "bias alone": dict(attn_bias=torch.randn(1, 1, 9, 1)),
    "sinks": dict(sinks=torch.randn(4)),
    "lengths": dict(key_lengths=torch.tensor([21, 4])),
    "strided lengths": dict(key_lengths=torch.tensor([21, 0, 4, 0])[::2]),
    "causal": dict(is_causal=True),
    "causal from the bottom right, by lengths": dict(
        is_causal=True, causal_alignment="bottom_right", key_lengths=torch.tensor([21, 4])
    ),
    "window": dict(window=(3, 2)),
    "softcap": dict(softcap=2.0),
    "log-sum-exp": dict(return_lse=True),
    "grouped heads": dict(enable_gqa=True),
}


def everything_short(options: dict[str, Any], inputs: list[Tensor]) -> list[Tensor]:
    """Output, LSE and gradients, those of masks too."""
    q, k, v = inputs
    masks = {n: options[n].clone().requires_grad_() for n in options if is_differentiable(options[n])}
    options = {**options, **masks}
    if options.get("enable_gqa"):
        k, v = k[:, :2], v[:, :2]
    result = mmk.cross_attention(q, k, v, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    total = sum(o.float().square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(total, [*inputs, *masks.values()])]


def is_differentiable(option: Any) -> bool:
    return isinstance(option, Tensor) and option.is_floating_point()


@short_way
@pytest.mark.parametrize("option", SHORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_short_way_in_serves_every_option_with_the_bits_of_the_long_one(
    option: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = plain_inputs(dtype)
    with mmk.use_backend("cpu"):
        long = everything_short(SHORT[option], inputs)
    monkeypatch.setattr(cross_attention_op, "forward", None)  # which only the long way asks for
    short = everything_short(SHORT[option], inputs)
    assert agree(short, long)


@short_way
@pytest.mark.parametrize("causal", [False, True])
def test_the_drop_in_takes_the_short_way(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in plain_inputs())
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    monkeypatch.setattr(cross_attention_op, "forward", None)
    torch.testing.assert_close(mmk.scaled_dot_product_attention(q, k, v, is_causal=causal), want)


@short_way
def test_the_short_way_in_is_left_to_plain_calls() -> None:
    q, k, v = (x.detach() for x in plain_inputs())

    def short(*tensors: Any, **changes: Any) -> Any:
        names = ("mask", "bias", "sinks", "lengths", "left", "right", "bottom_right", "softcap", "scale", "dropout_p")
        usual = dict(zip(names, (None, None, None, None, -1, -1, False, 0.0, None, 0.0), strict=True))
        return cross_attention_op.unchecked(*tensors, *{**usual, **changes}.values(), None, False, False)

    assert short(q, k, v) is not None
    for other in (q.double(), q.to("meta"), q[0], q.mT.contiguous().mT, k[:1], k[:, :, :8], k[:, :2], None, 3):
        assert short(q, k, other) is None
    assert short(q.double(), k.double(), v.double()) is None
    for change in (
        dict(scale=1),
        dict(mask=torch.ones(9, 20, dtype=torch.bool)),
        dict(mask=torch.ones(9, 21, dtype=torch.int32)),
        dict(bias=torch.ones(9, 21, dtype=torch.bool)),
        dict(sinks=torch.ones(3)),
        dict(lengths=torch.tensor([22, 4])),
        dict(lengths=torch.tensor([-1, 4])),
        dict(left=-2),
        dict(left=None),
        dict(softcap=-1.0),
        dict(softcap=float("nan")),
        dict(dropout_p=0.5),
    ):
        assert short(q, k, v, **change) is None, change
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert short(q, k, v) is None
        assert mmk.cross_attention(q, k, v).dtype == torch.bfloat16
    assert torch.func.vmap(lambda q: mmk.cross_attention(q, k, v))(torch.stack([q, q])).shape == (2, 2, 4, 9, 24)


@short_way
def test_the_short_way_in_differentiates_twice() -> None:
    def second(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in plain_inputs()]
        first = torch.autograd.grad(mmk.cross_attention(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for got, oracle in zip(second(torch.float32), second(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), oracle, rtol=1e-4, atol=1e-5)


x = torch.zeros(2, 4, 7, 8)
three = torch.zeros(3, 4, 7, 8)
meta = torch.zeros(2, 4, 7, 8, device="meta")
BAD: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
    (TypeError, r"query: expected a torch.Tensor; got list", ([], x, x), {}),
    (TypeError, r"value: expected a torch.Tensor; got NoneType", (x, x, None), {}),
    (TypeError, r"query: expected dtype float32.*; got torch.int64", (x.long(), x.long(), x.long()), {}),
    (TypeError, r"key: expected the dtype of query, torch.float32; got torch.float16", (x, x.half(), x), {}),
    (RuntimeError, rf"value: expected the device of query, {HERE}; got meta", (x, x, meta), {}),
    (ValueError, r"query: expected 4 dims \(B, H, L, D\); got shape \(4, 7, 8\)", (x[0], x, x), {}),
    (ValueError, r"key: expected shape \(2, Hkv, Lk, 8\), or a batch of 1; got \(3, 4, 7, 8\)", (x, three, three), {}),
    (ValueError, r"value: expected shape \(2, 4, 7, Dv\), or a batch of 1; got \(3, 4, 7, 8\)", (x, x[:1], three), {}),
    (ValueError, r"key: expected shape \(2, Hkv, Lk, 8\); got \(2, 4, 7, 5\)", (x, x[..., :5], x), {}),
    (ValueError, r"value: expected shape \(2, 4, 7, Dv\); got \(2, 4, 6, 8\)", (x, x, x[:, :, 1:]), {}),
    (ValueError, r"key: expected 4 heads .*enable_gqa.*; got 2 heads", (x, x[:, :2], x[:, :2]), {}),
    (ValueError, r"key: .* divides query's 4; got 3", (x, x[:, :3], x[:, :3]), {"enable_gqa": True}),
    (TypeError, r"attn_mask: expected a torch.Tensor; got float", (x, x, x), {"attn_mask": 1.0}),
    (TypeError, r"attn_mask: expected dtype bool.*; got torch.int64", (x, x, x), {"attn_mask": x[0, 0].long()}),
    (ValueError, r"attn_mask: .* \(2, 4, 7, 7\); got \(3, 7\)", (x, x, x), {"attn_mask": torch.zeros(3, 7)}),
    (ValueError, r"attn_mask: expected 2 to 4 dims; got shape \(7,\)", (x, x, x), {"attn_mask": torch.zeros(7)}),
    (RuntimeError, rf"attn_mask: .* {HERE}; got meta", (x, x, x), {"attn_mask": meta[..., :7]}),
    (TypeError, r"key_lengths: .*int32 or int64; got torch.float32", (x, x, x), {"key_lengths": torch.ones(2)}),
    (
        ValueError,
        r"key_lengths: expected shape \(2,\); got \(3,\)",
        (x, x, x),
        {"key_lengths": torch.tensor([1, 1, 1])},
    ),
    (ValueError, r"key_lengths: .* \[0, 7\]; got \[3, 8\]", (x, x, x), {"key_lengths": torch.tensor([3, 8])}),
    (ValueError, r"key_lengths: .* \[0, 7\]; got \[-1, 2\]", (x, x, x), {"key_lengths": torch.tensor([2, -1])}),
    (ValueError, r"causal_alignment: .*'bottom_right'; got 'center'", (x, x, x), {"causal_alignment": "center"}),
    (TypeError, r"window: expected a pair", (x, x, x), {"window": 3}),
    (TypeError, r"window: expected a pair", (x, x, x), {"window": (1.5, 2)}),
    (ValueError, r"window: .*-1 for unbounded; got \(-2, 0\)", (x, x, x), {"window": (-2, 0)}),
    (ValueError, r"softcap: expected a finite number ≥ 0; got -1.0", (x, x, x), {"softcap": -1.0}),
    (ValueError, r"softcap: .*; got nan", (x, x, x), {"softcap": math.nan}),
    (TypeError, r"scale: expected a number; got str", (x, x, x), {"scale": "0.5"}),
    (ValueError, r"dropout_p: expected a probability in \[0, 1\]; got 1.5", (x, x, x), {"dropout_p": 1.5}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), BAD, ids=[message[:40] for _, message, *_ in BAD])
def test_bad_input_names_op_argument_expectation_and_what_came(
    error: type[Exception], message: str, inputs: tuple[Any, ...], options: dict[str, Any]
) -> None:
    if DEVICE != "cpu" and r"\[0, 7\]" in message:
        pytest.skip("looking at lengths on a GPU would wait for it")
    with pytest.raises(error, match="^cross_attention: " + message):
        mmk.cross_attention(*inputs, **options)


def test_the_drop_in_names_itself_in_errors() -> None:
    with pytest.raises(
        ValueError, match=r"^scaled_dot_product_attention: attn_mask: expected None where is_causal=True"
    ):
        mmk.scaled_dot_product_attention(x, x, x, torch.zeros(7, 7), is_causal=True)
    with pytest.raises(ValueError, match=r"^scaled_dot_product_attention: query: expected at least 2 dims"):
        mmk.scaled_dot_product_attention(x[0, 0, 0], x, x)
    with pytest.raises(ValueError, match=r"^scaled_dot_product_attention: key: expected leading dims that broadcast"):
        mmk.scaled_dot_product_attention(x, torch.zeros(3, 4, 7, 8), torch.zeros(3, 4, 7, 8))
    with pytest.raises(ValueError, match=r"^scaled_dot_product_attention: attn_mask: expected a shape broadcastable"):
        mmk.scaled_dot_product_attention(x[0], x[0], x[0], torch.zeros(2, 7, 7))
