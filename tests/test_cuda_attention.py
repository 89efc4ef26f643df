"""The CUDA kernels of attention to few keys: cross_attention and joint_attention."""

from __future__ import annotations

from typing import Any

import attention_cases
import op_contract as contract
import pytest
import torch
from cuda_cases import each_half, emulator_only, schedule, some_schedules, take_counts
from fusion_cases import leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory


def qkv(dtype: torch.dtype = torch.bfloat16, *, dim: int = 64, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values have the head dim of keys."""
    return attention_cases.qkv(dtype, dim=dim, value_dim=dim, **sizes)


@each_half
@some_schedules
@pytest.mark.parametrize("dim", [24, 64, 96, 128, 256])
def test_outputs_and_gradients_match_the_oracle(dim: int, dtype: torch.dtype, cuda_backend: str) -> None:
    with poisoned_memory():
        check_op(mmk.cross_attention, *qkv(dtype, dim=dim), backend=cuda_backend, enable_gqa=True, return_lse=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (16, 16), (17, 15), (130, 200), (3, 512), (0, 5)])
def test_lengths(queries: int, keys: int, cuda_backend: str) -> None:
    inputs = qkv(batch=1, key_heads=2, queries=queries, keys=keys, dim=32)
    with poisoned_memory():
        check_op(mmk.cross_attention, *inputs, backend=cuda_backend, return_lse=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "padded": dict(key_lengths=torch.tensor([77, 0])),
    "negative scale": dict(scale=-0.3),
    "bool mask": dict(attn_mask=torch.rand(2, 1, 70, 77) > 0.4),
    "bool mask of keys, padded": dict(attn_mask=torch.rand(2, 1, 1, 77) > 0.4, key_lengths=torch.tensor([77, 30])),
    "float mask of all pairs": dict(attn_mask=leaf(70, 77, dtype=torch.bfloat16)),
    "float mask of keys and heads": dict(attn_mask=leaf(2, 1, 77, dtype=torch.bfloat16)),
    "float mask of queries and batch": dict(attn_mask=leaf(2, 1, 70, 1, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, cuda_backend: str) -> None:
    with poisoned_memory():
        options = OPTIONS[option]
        check_op(mmk.cross_attention, *qkv(), backend=cuda_backend, enable_gqa=True, return_lse=True, **options)


@each_half
def test_hidden_values_that_are_not_finite_reach_nobody(dtype: torch.dtype, cuda_backend: str) -> None:
    attention_cases.check_hidden_values_reach_nobody(dtype)


def test_what_is_padded_is_not_read(cuda_backend: str) -> None:
    query, key, value = qkv(key_heads=2)
    lengths = torch.tensor([40, 0])
    expected = mmk.cross_attention(query, key, value, key_lengths=lengths)
    for x in (key, value):
        for b, n in enumerate(lengths.tolist()):
            x.data[b, :, n:] = torch.nan
    assert torch.equal(mmk.cross_attention(query, key, value, key_lengths=lengths), expected)


def test_gradients_are_the_same_alone_in_any_memory_order_and_every_time(cuda_backend: str) -> None:
    def function(*leaves: Tensor) -> Tensor:
        return mmk.cross_attention(*leaves)

    leaves = list(qkv(key_heads=2, queries=150))
    contract.check_each_gradient_alone(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)
    expected = contract.gradients(function, leaves)
    by_tokens = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
    for seed in (0, 3):
        with schedule(seed):
            for got, exact in zip(contract.gradients(function, by_tokens), expected, strict=True):
                assert torch.equal(got, exact)


@each_half
@some_schedules
def test_joint_attention(dtype: torch.dtype, cuda_backend: str) -> None:
    streams = [[leaf(2, 2, n, 32, dtype=dtype) for n in lengths] for lengths in ((33, 5), (7, 40, 0), (7, 40, 0))]
    bias = torch.randn(2, 2, 3)
    bias[0, 1, 1] = -torch.inf
    options = {"key_lengths": [None, torch.tensor([17, 40]), None], "stream_bias": bias.requires_grad_()}
    with poisoned_memory():
        check_op(mmk.joint_attention, *streams, backend=cuda_backend, **options)


def test_joint_attention_of_absent_streams_and_one_bias_for_all_heads(cuda_backend: str) -> None:
    streams = [[leaf(1, 4, n, 64, dtype=torch.float16) for n in (20, 200)] for _ in range(3)]
    bias = torch.tensor([[0.5, -torch.inf], [0.0, 1.0]], requires_grad=True)
    check_op(mmk.joint_attention, *streams, backend=cuda_backend, stream_bias=bias)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@emulator_only
def test_matrix_loads_meet_no_bank_conflict(dim: int, cuda_backend: str) -> None:
    query, key, value = qkv(dim=dim, key_heads=2, keys=80)
    take_counts()
    mmk.cross_attention(query, key, value).sum().backward()
    counts = take_counts()
    assert counts["mma"] > 0 and counts["matrix_loads"] > 0
    assert counts["bank_conflicts"] == 0


def test_what_is_declined_says_why(cuda_backend: str) -> None:
    def declined(match: str, *inputs: Tensor, **options: Any) -> None:
        with pytest.raises(mmk.UnsupportedError, match=match):
            mmk.cross_attention(*inputs, **options)

    inputs = qkv(key_heads=2)
    declined("no window, causal mask, softcap or dropout", *inputs, is_causal=True)
    declined("no window, causal mask, softcap or dropout", *inputs, dropout_p=0.5)
    declined("batch 65536 and 2 heads: the blocks", *(x[:1].expand(65536, -1, -1, -1) for x in inputs))
    declined("513 keys: its kernel takes 1 to 512", *qkv(key_heads=2, keys=513))
    declined("head dims 20 and 20: its kernel takes one multiple of 8", *qkv(key_heads=2, dim=20))
    declined("bytes of shared memory, more than", *qkv(key_heads=2, keys=512, dim=128))
    declined("no multiple of 16 bytes", *(x[..., 4:44] for x in inputs))
    declined("float32 is not among the 16-bit dtypes", *(x.float() for x in inputs))
