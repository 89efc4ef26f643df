"""The Triton kernels of modulated_norm, concat_tokens and merge_embeddings."""

from __future__ import annotations

import op_contract as contract
import pytest
import torch
from environment import DEVICE
from fusion_cases import each_dtype, leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits


@each_dtype
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_modulated_norm(norm: str | None, dtype: torch.dtype, triton_backend: str) -> None:
    weights = {} if norm is None else {n: leaf(40, dtype=dtype) for n in ("norm_weight", "norm_bias")}
    for condition in ((2, 40), (2, 9, 40)):
        inputs = leaf(2, 9, 40, dtype=dtype), leaf(*condition, dtype=dtype), leaf(2, 40, dtype=dtype)
        with poisoned_memory():
            check_op(mmk.modulated_norm, *inputs, backend=triton_backend, norm=norm, **weights)


def test_modulated_norm_far_from_zero(triton_backend: str) -> None:
    x = (leaf(1, 5, 70).detach() + 1e3).requires_grad_()
    check_op(mmk.modulated_norm, x, leaf(1, 70), leaf(1, 70), backend=triton_backend)


def test_modulated_norms_gradients_are_the_same_alone_and_with_any_strides(triton_backend: str) -> None:
    leaves = [leaf(2, 5, 20), leaf(2, 20), leaf(2, 20)]
    contract.check_each_gradient_alone(mmk.modulated_norm, leaves)
    contract.check_strides(mmk.modulated_norm, leaves)
    contract.check_threads_and_runs_agree(mmk.modulated_norm, leaves)


@each_dtype
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_concat_tokens(norm: str | None, dtype: torch.dtype, triton_backend: str) -> None:
    for batch, features in ((2, 40), (5, 300)):
        xs = [leaf(batch, length, features, dtype=dtype) for length in (3, 0, 5)]
        weights = {} if norm is None else {n: leaf(features, dtype=dtype) for n in ("norm_weight", "norm_bias")}
        embeddings = {
            "type_embedding": leaf(3, features, dtype=dtype),
            "position_embeddings": [leaf(3, features, dtype=dtype), None, leaf(5, features, dtype=dtype)],
        }
        with poisoned_memory():
            check_op(mmk.concat_tokens, xs, backend=triton_backend, norm=norm, **weights, **embeddings)


def test_concat_tokens_gradients_are_the_same_alone_and_with_any_strides(triton_backend: str) -> None:
    def function(x: Tensor, y: Tensor, types: Tensor, position: Tensor, weight: Tensor) -> Tensor:
        options = {"type_embedding": types, "position_embeddings": [None, position], "norm_weight": weight}
        return mmk.concat_tokens([x, y], norm="layer", **options)

    leaves = [leaf(2, 3, 20), leaf(2, 4, 20), leaf(2, 20), leaf(4, 20), leaf(20)]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)


@each_dtype
@pytest.mark.parametrize(("length", "features", "counts"), [(33, 37, (5, 0, 7)), (2, 2100, (1, 1)), (6, 16, (12,))])
def test_merge_embeddings_is_masked_scatter_bit_for_bit(
    length: int, features: int, counts: tuple[int, ...], dtype: torch.dtype, triton_backend: str
) -> None:
    mask = torch.zeros(2 * length, dtype=torch.bool)
    mask[torch.randperm(2 * length)[: sum(counts)]] = True
    mask = mask.view(2, length)
    text, modals = leaf(2, length, features, dtype=dtype), [leaf(n, features, dtype=dtype) for n in counts]

    def results(out: Tensor) -> list[Tensor]:
        grad = torch.arange(out.numel(), device=out.device).view(out.shape).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, [text, *modals], grad)]

    expected = results(text.masked_scatter(mask.unsqueeze(-1), torch.cat(modals)))
    with poisoned_memory():
        assert same_bits(results(mmk.merge_embeddings(text, modals, mask)), expected)


def test_a_row_too_wide_falls_through_and_says_why() -> None:
    x, condition = torch.zeros(1, 1, 4097), torch.zeros(1, 4097)
    with mmk.use_backend("triton"), pytest.raises(mmk.UnsupportedError, match="4097 features are more than the 4096"):
        mmk.modulated_norm(x, condition, condition)
    if DEVICE != "cpu":
        assert mmk.explain(mmk.modulated_norm, x, condition, condition).backend == "reference"
