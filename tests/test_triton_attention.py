"""The Triton kernels of attention: one core behind cross_attention, joint_attention and varlen_cross_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import agree
from attention_cases import check_hidden_values_reach_nobody, qkv
from fusion_cases import each_dtype, leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels import _triton
from mmkernels.testing import check_op, poisoned_memory

if _triton.absent() is None:
    from mmkernels.triton import attention_forward, attention_forward_tma


@each_dtype
def test_outputs_and_gradients_match_the_oracle(dtype: torch.dtype, triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.cross_attention, *qkv(dtype), backend=triton_backend, enable_gqa=True, return_lse=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal from the end, padded": dict(
        is_causal=True, causal_alignment="bottom_right", key_lengths=torch.tensor([77, 0]), return_lse=True
    ),
    "window": dict(window=(9, 3)),
    "softcap": dict(softcap=3.0),
    "bool mask": dict(attn_mask=torch.rand(2, 1, 70, 77) > 0.4),
    "dropout": dict(dropout_p=0.3),
    "float mask of all pairs": dict(attn_mask=leaf(70, 77)),
    "float mask of keys and heads": dict(attn_mask=leaf(2, 1, 77)),
    "float mask of queries and batch": dict(attn_mask=leaf(2, 1, 70, 1)),
    "bool mask of keys, bias of all pairs": dict(attn_mask=torch.rand(2, 1, 1, 77) > 0.4, attn_bias=leaf(70, 77)),
    "float mask and bias, both with gradients": dict(attn_mask=leaf(2, 1, 1, 77), attn_bias=leaf(1, 2, 70, 1)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, triton_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.cross_attention, *qkv(), backend=triton_backend, enable_gqa=True, **OPTIONS[option])


@pytest.mark.parametrize(("queries", "keys"), [(3, 700), (16, 90), (0, 5), (5, 0)])
def test_few_queries_and_empty_sides(queries: int, keys: int, triton_backend: str) -> None:
    inputs = qkv(queries=queries, keys=keys, key_heads=2)
    with poisoned_memory():
        check_op(mmk.cross_attention, *inputs, backend=triton_backend, return_lse=True)


@pytest.mark.parametrize("queries", [1, 3])
def test_queries_that_share_a_key_head(queries: int, triton_backend: str) -> None:
    mask = torch.rand(2, 1, 1, 90) > 0.4
    inputs = qkv(heads=8, queries=queries, keys=90, key_heads=2)
    by_tokens = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for tensors in (inputs, by_tokens):
        with poisoned_memory():
            options = dict(backend=triton_backend, enable_gqa=True, return_lse=True, attn_mask=mask)
            check_op(mmk.cross_attention, *tensors, **options)


def test_hidden_values_that_are_not_finite_reach_nobody(triton_backend: str) -> None:
    check_hidden_values_reach_nobody(torch.float32)


def test_memory_orders_and_single_gradients_give_the_same_bits(triton_backend: str) -> None:
    def gradients(*needed: bool, transposed: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [x.detach() for x in qkv(key_heads=2)]
        if transposed:
            leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
        leaves = [x.requires_grad_(n) for x, n in zip(leaves, needed, strict=True)]
        out = mmk.cross_attention(*leaves)
        assert out.transpose(1, 2).is_contiguous() == transposed
        wanted = [x for x in leaves if x.requires_grad]
        return list(torch.autograd.grad(out.sin().sum(), wanted))

    together = gradients(True, True, True)
    assert agree(gradients(True, True, True, transposed=True), together)
    for i in range(3):
        assert agree(gradients(*(i == j for j in range(3))), [together[i]])


@each_dtype
def test_joint_attention(dtype: torch.dtype, triton_backend: str) -> None:
    streams = [[leaf(2, 2, n, 24, dtype=dtype) for n in lengths] for lengths in ((33, 5), (7, 40, 0), (7, 40, 0))]
    bias = torch.randn(2, 2, 3)
    bias[0, 1, 1] = -torch.inf
    options = {"key_lengths": [None, torch.tensor([17, 40]), None], "stream_bias": bias.requires_grad_()}
    with poisoned_memory():
        check_op(mmk.joint_attention, *streams, backend=triton_backend, **options)


def test_joint_attention_of_grouped_heads_with_dropout(triton_backend: str) -> None:
    queries = [leaf(2, 4, n, 24) for n in (33, 5)]
    keys, values = ([leaf(2, 2, n, 24) for n in (7, 40)] for _ in range(2))
    with poisoned_memory():
        check_op(mmk.joint_attention, queries, keys, values, backend=triton_backend, enable_gqa=True)
        one = queries[:1], keys[1:], values[1:]
        check_op(mmk.joint_attention, *one, backend=triton_backend, enable_gqa=True, dropout_p=0.3)
    with pytest.raises(mmk.UnsupportedError, match="count dropout within a stream"):
        mmk.joint_attention(queries, keys, values, enable_gqa=True, dropout_p=0.3)


@each_dtype
def test_varlen_cross_attention(dtype: torch.dtype, triton_backend: str) -> None:
    query, key, value = leaf(50, 4, 24, dtype=dtype), leaf(95, 2, 24, dtype=dtype), leaf(95, 2, 16, dtype=dtype)
    ends = torch.tensor([0, 12, 12, 50], dtype=torch.int32), torch.tensor([0, 49, 60, 95], dtype=torch.int32)
    with poisoned_memory():
        check_op(
            mmk.varlen_cross_attention, query, key, value, *ends, 38, 49, backend=triton_backend, is_causal=True,
            return_lse=dtype == torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "queries", "keys", "dtype"), [(64, 70, 300, torch.bfloat16), (128, 130, 77, torch.float16)], ids=str
)
def test_tensor_descriptors(
    dim: int, queries: int, keys: int, dtype: torch.dtype, triton_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(heads=4, key_heads=2, queries=queries, keys=keys, dim=dim, value_dim=dim)
    inputs = qkv(dtype, **sizes)
    by_tokens = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    expected = mmk.cross_attention(*inputs, enable_gqa=True, return_lse=True)
    calls: list[int] = []
    monkeypatch.setattr(attention_forward_tma, "_LEAST_FLOPS", 0)
    through = attention_forward_tma.attend_by_descriptors
    monkeypatch.setattr(attention_forward, "attend_by_descriptors", lambda *args: calls.append(1) or through(*args))
    for tensors in (inputs, by_tokens):
        with poisoned_memory():
            check_op(mmk.cross_attention, *tensors, backend=triton_backend, enable_gqa=True, return_lse=True)
    assert calls, "served by the other kernel"
    for got, exact in zip(mmk.cross_attention(*inputs, enable_gqa=True, return_lse=True), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=2**-7, atol=2**-9)
    streams = [[leaf(1, 2, n, dim, dtype=dtype) for n in (33, 150)] for _ in range(3)]
    calls.clear()
    with poisoned_memory():
        check_op(mmk.joint_attention, *streams, backend=triton_backend)
    assert calls


def test_what_has_no_tensor_descriptor() -> None:
    x = torch.zeros(2, 3, 32, 64, dtype=torch.bfloat16)
    assert attention_forward_tma.describable(x)
    assert attention_forward_tma.describable(x.transpose(1, 2))
    assert attention_forward_tma.describable(x[:1, :, :1])
    assert not attention_forward_tma.describable(x[:1].expand(2, 3, 32, 64))
    assert not attention_forward_tma.describable(x[..., 1:])
    assert not attention_forward_tma.describable(x[:, :, :0])


def test_what_falls_through_says_why() -> None:
    def attend(dim: int, dtype: torch.dtype, **options: Any) -> Tensor:
        return mmk.cross_attention(*qkv(dtype, dim=dim, value_dim=dim, key_heads=2, queries=4, keys=4), **options)

    with mmk.use_backend("triton"):
        with pytest.raises(mmk.UnsupportedError, match="a head dim of 257 is more than the 256"):
            attend(257, torch.bfloat16)
        with pytest.raises(mmk.UnsupportedError, match="a head dim of 136 is more than the 128"):
            attend(136, torch.float32)
        out = attend(72, torch.float32, dropout_p=0.1)
        with pytest.raises(mmk.UnsupportedError, match=r"a head dim of 72 is more than the 64 .* gradient of dropout"):
            out.sum().backward()
