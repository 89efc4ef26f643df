"""The CUDA kernels of modulated_norm, concat_tokens and merge_embeddings."""

from __future__ import annotations

from typing import Any

import op_contract as contract
import pytest
import torch
from cuda_cases import each_half, some_schedules
from fusion_cases import leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory, same_bits


@each_half
@some_schedules
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("features", [40, 264, 1040])
def test_modulated_norm(features: int, norm: str | None, dtype: torch.dtype, cuda_backend: str) -> None:
    weights = {} if norm is None else {n: leaf(features, dtype=dtype) for n in ("norm_weight", "norm_bias")}
    for condition in ((2, features), (2, 9, features)):
        inputs = leaf(2, 9, features, dtype=dtype), leaf(*condition, dtype=dtype), leaf(2, features, dtype=dtype)
        with poisoned_memory():
            check_op(mmk.modulated_norm, *inputs, backend=cuda_backend, norm=norm, **weights)


def test_modulated_norm_of_many_tokens(cuda_backend: str) -> None:
    inputs = [leaf(3, 3000, 16, dtype=torch.bfloat16), *(leaf(3, 16, dtype=torch.bfloat16) for _ in range(2))]
    check_op(mmk.modulated_norm, *inputs, backend=cuda_backend)


def test_modulated_norms_gradients_are_the_same_alone_and_with_any_strides(cuda_backend: str) -> None:
    leaves = [leaf(2, 5, 24, dtype=torch.bfloat16), *(leaf(2, 24, dtype=torch.bfloat16) for _ in range(2))]
    contract.check_each_gradient_alone(mmk.modulated_norm, leaves)
    contract.check_threads_and_runs_agree(mmk.modulated_norm, leaves)
    transposed = [leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1), *leaves[1:]]
    assert torch.equal(mmk.modulated_norm(*transposed), mmk.modulated_norm(*leaves))


@pytest.mark.parametrize("features", [37, 4104])
def test_modulated_norm_declines_and_says_why(features: int, cuda_backend: str) -> None:
    x, condition = torch.zeros(1, 2, features, dtype=torch.half), torch.zeros(1, features, dtype=torch.half)
    with pytest.raises(mmk.UnsupportedError, match=f"{features} features: its kernel takes multiples of 8 up to 4096"):
        mmk.modulated_norm(x, condition, condition)
    if features == 37:
        x = torch.zeros(1, 2, 41, dtype=torch.half)[..., 1:]
        with pytest.raises(mmk.UnsupportedError, match="no multiple of 16 bytes"):
            mmk.modulated_norm(x, x[:, 0], x[:, 0])


def concat_options(xs: list[Tensor], *, types: bool, positions: str, norm: str | None) -> dict[str, Any]:
    """Embeddings and weights; a letter of ``positions`` per source, x where it has an embedding."""
    dtype, features = xs[0].dtype, xs[0].shape[2]
    tables = [leaf(x.shape[1], features, dtype=dtype) if p == "x" else None for x, p in zip(xs, positions, strict=True)]
    options: dict[str, Any] = {"norm": norm, "position_embeddings": tables}
    if types:
        options["type_embedding"] = leaf(len(xs), features, dtype=dtype)
    if norm is not None:
        options |= {name: leaf(features, dtype=dtype) for name in ("norm_weight", "norm_bias")}
    return options


@each_half
@some_schedules
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("positions", ["---", "x-x", "xxx"])
def test_concat_tokens(positions: str, types: bool, norm: str | None, dtype: torch.dtype, cuda_backend: str) -> None:
    for batch, features in ((2, 40), (5, 264)):
        xs = [leaf(batch, length, features, dtype=dtype) for length in (3, 0, 5)]
        with poisoned_memory():
            options = concat_options(xs, types=types, positions=positions, norm=norm)
            check_op(mmk.concat_tokens, xs, backend=cuda_backend, **options)


@each_half
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(
    ("batch", "lengths", "features"),
    [
        pytest.param(1, (2, 3), 776, id="three vectors of a thread"),
        pytest.param(2, (2, 1), 1040, id="teams of several warps"),
        pytest.param(1, (2, 1), 4096, id="the widest row with a norm"),
        pytest.param(33, (7, 13), 8, id="several shares of the batch"),
        pytest.param(70, (40, 9), 16, id="several rows of a team"),
        pytest.param(1, (1500, 1200), 8, id="several positions of a team"),
        pytest.param(3, (1,) * 32, 24, id="as many sources as there may be"),
        pytest.param(2, (0, 0), 8, id="no tokens"),
        pytest.param(0, (3, 2), 8, id="no batch"),
    ],
)
def test_concat_tokens_of_all_sizes(
    batch: int, lengths: tuple[int, ...], features: int, norm: str | None, dtype: torch.dtype, cuda_backend: str
) -> None:
    xs = [leaf(batch, length, features, dtype=dtype) for length in lengths]
    for positions in ("-" * len(xs), "x" * len(xs)):
        options = concat_options(xs, types=True, positions=positions, norm=norm)
        with poisoned_memory():
            check_op(mmk.concat_tokens, xs, backend=cuda_backend, **options)


@each_half
@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_concat_tokens_into_another_dtype(
    out_dtype: torch.dtype, norm: str | None, dtype: torch.dtype, cuda_backend: str
) -> None:
    xs = [leaf(3, length, 40, dtype=dtype) for length in (3, 4)]
    options = concat_options(xs, types=True, positions="x-", norm=norm)
    check_op(mmk.concat_tokens, xs, backend=cuda_backend, out_dtype=out_dtype, **options)


@each_half
@pytest.mark.parametrize("features", [40, 4104])
def test_concat_tokens_with_nothing_to_do_is_cat_bit_for_bit(
    features: int, dtype: torch.dtype, cuda_backend: str
) -> None:
    xs = [leaf(2, length, features, dtype=dtype).detach() for length in (3, 0, 2)]
    xs[0][0, 0, :3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    xs = [x.requires_grad_() for x in xs]
    out = mmk.concat_tokens(xs)
    grad = torch.randn(out.shape).to(dtype)
    expected = [torch.cat(xs, 1), *grad.split([3, 0, 2], 1)]
    assert same_bits([out, *torch.autograd.grad(out, xs, grad)], expected)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_concat_tokens_gradients_are_the_same_alone_and_with_any_strides(norm: str | None, cuda_backend: str) -> None:
    def function(x: Tensor, y: Tensor, types: Tensor, position: Tensor, *weights: Tensor) -> Tensor:
        options = dict(zip(("norm_weight", "norm_bias"), weights, strict=False))
        places = [None, position]
        return mmk.concat_tokens([x, y], norm=norm, type_embedding=types, position_embeddings=places, **options)

    shapes = [(9, 3, 24), (9, 40, 24), (2, 24), (40, 24), *([(24,)] * 2 if norm else [])]
    leaves = [leaf(*shape, dtype=torch.bfloat16) for shape in shapes]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)
    transposed = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x for x in leaves]
    assert same_bits(contract.gradients(function, transposed), contract.gradients(function, leaves))
    asked = [x.detach().requires_grad_() for x in leaves]
    out = function(*asked)
    dense = torch.autograd.grad(out, asked, torch.ones_like(out))
    assert same_bits(torch.autograd.grad(function(*asked).sum(), asked), dense)  # an expanded gradient


def test_concat_tokens_declines_and_says_why(cuda_backend: str) -> None:
    def zeros(features: int) -> Tensor:
        return torch.zeros(1, 2, features, dtype=torch.half)

    for features, norm in ((37, None), (4104, "layer")):
        with pytest.raises(mmk.UnsupportedError, match=f"{features} features: its kernel takes multiples of 8, with a"):
            mmk.concat_tokens([zeros(features)], norm=norm)
    with pytest.raises(mmk.UnsupportedError, match="33 sources, more than 32"):
        mmk.concat_tokens([zeros(8)] * 33)
    with pytest.raises(mmk.UnsupportedError, match="no multiple of 16 bytes"):
        mmk.concat_tokens([zeros(41)[..., 1:]])
    with pytest.raises(mmk.UnsupportedError, match="out_dtype float64"):
        mmk.concat_tokens([zeros(8)], out_dtype=torch.float64)


def check_merge(text: Tensor, modals: list[Tensor], mask: Tensor, check: bool | None = None) -> None:
    """Output and gradients are those of masked_scatter bit for bit."""

    def results(out: Tensor) -> list[Tensor]:
        grad = contract.fixed_gradient(out)
        return [out.detach(), *torch.autograd.grad(out, [text, *modals], grad)]

    expected = results(text.masked_scatter(mask.unsqueeze(-1), torch.cat(modals)))
    with poisoned_memory():
        assert same_bits(results(mmk.merge_embeddings(text, modals, mask, check=check)), expected)


def mask_with(trues: int, batch: int, length: int) -> Tensor:
    mask = torch.zeros(batch * length, dtype=torch.bool)
    mask[torch.randperm(batch * length)[:trues]] = True
    return mask.view(batch, length)


@each_half
@some_schedules
@pytest.mark.parametrize(
    ("batch", "length", "features", "counts"),
    [
        pytest.param(2, 33, 40, (5, 0, 7), id="several modals"),
        pytest.param(2, 2, 2064, (1, 1), id="wide rows"),
        pytest.param(2, 6, 16, (12,), id="all replaced"),
        pytest.param(2, 37, 24, (0,), id="none replaced"),
        pytest.param(3, 700, 8, (300, 301), id="several tiles of a chunk"),
        pytest.param(3, 1501, 8, (1200, 3, 700), id="more tokens than a block counts itself"),
        pytest.param(1, 50, 8, (1,) * 40, id="many modals"),
        pytest.param(0, 9, 8, (0,), id="no batch"),
    ],
)
def test_merge_embeddings(
    batch: int, length: int, features: int, counts: tuple[int, ...], dtype: torch.dtype, cuda_backend: str
) -> None:
    text, modals = leaf(batch, length, features, dtype=dtype), [leaf(n, features, dtype=dtype) for n in counts]
    check_merge(text, modals, mask_with(sum(counts), batch, length))


@pytest.mark.parametrize("trues", [0, 1, 6, 11])
@pytest.mark.parametrize(("batch", "length"), [(3, 7), (2, 2600)])
def test_merge_embeddings_leaves_rows_unused(batch: int, length: int, trues: int, cuda_backend: str) -> None:
    text, modals = (
        leaf(batch, length, 24, dtype=torch.bfloat16),
        [leaf(n, 24, dtype=torch.bfloat16) for n in (5, 0, 6, 200)],
    )
    check_merge(text, modals, mask_with(trues, batch, length), check=False)


@pytest.mark.parametrize("length", [7, 2600])
def test_merge_embeddings_keeps_the_text_where_there_is_no_row(length: int, cuda_backend: str) -> None:
    text, modal = leaf(2, length, 16, dtype=torch.float16), leaf(3, 16, dtype=torch.float16)
    mask = mask_with(9, 2, length)
    out = mmk.merge_embeddings(text, modal, mask, check=False)
    first = mask.flatten().nonzero()[:3, 0]
    expected = text.detach().clone().view(-1, 16)
    expected[first] = modal.detach()
    assert same_bits([out.view(-1, 16)], [expected])
    grad = torch.randn(out.shape).half()
    of_text, of_modal = torch.autograd.grad(out, [text, modal], grad)
    assert same_bits([of_text, of_modal], [grad.masked_fill(mask.unsqueeze(-1), 0), grad.view(-1, 16)[first]])


def test_merge_embeddings_copies_any_bits(cuda_backend: str) -> None:
    bits = torch.randint(-(2**15), 2**15, (2, 40, 24), dtype=torch.int16)
    text, modal, mask = bits[:1].view(torch.float16), bits[1].view(torch.float16), mask_with(40, 1, 40)
    out = mmk.merge_embeddings(text, modal, mask)
    assert torch.equal(out.view(torch.int16), bits[1:])
    out = mmk.merge_embeddings(text, modal[:0], torch.zeros_like(mask))
    assert torch.equal(out.view(torch.int16), bits[:1])


def test_merge_embeddings_gradients_are_the_same_alone_and_with_any_strides(cuda_backend: str) -> None:
    mask = mask_with(13, 3, 9)

    def function(text: Tensor, *modals: Tensor) -> Tensor:
        return mmk.merge_embeddings(text, modals, mask)

    leaves = [leaf(*shape, dtype=torch.bfloat16) for shape in ((3, 9, 24), (8, 24), (5, 24))]
    contract.check_each_gradient_alone(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)
    expected = contract.gradients(function, leaves)
    transposed = [leaves[0].detach().transpose(0, 1).contiguous().transpose(0, 1), *leaves[1:]]
    assert same_bits(contract.gradients(function, transposed), expected)
    every_other = [x.detach().repeat_interleave(2, 0)[::2] for x in leaves]
    mask = mask.t().contiguous().t()
    assert same_bits(contract.gradients(function, every_other), expected)
    asked = [x.detach().requires_grad_() for x in leaves]
    out = function(*asked)
    dense = torch.autograd.grad(out, asked, torch.ones_like(out))
    assert same_bits(torch.autograd.grad(function(*asked).sum(), asked), dense)  # an expanded gradient


def test_merge_embeddings_checks_the_count(cuda_backend: str) -> None:
    text, modal = torch.zeros(1, 4, 8, dtype=torch.half), torch.zeros(2, 8, dtype=torch.half)
    with pytest.raises(ValueError, match="mask: expected 2 True positions, one for each row of modal; got 3"):
        mmk.merge_embeddings(text, modal, mask_with(3, 1, 4))


def test_merge_embeddings_declines_and_says_why(cuda_backend: str) -> None:
    text, modal, mask = torch.zeros(1, 4, 41).half(), torch.zeros(2, 41).half(), mask_with(2, 1, 4)
    with pytest.raises(mmk.UnsupportedError, match="41 features: its kernel takes multiples of 8"):
        mmk.merge_embeddings(text, modal, mask)
    with pytest.raises(mmk.UnsupportedError, match="no multiple of 16 bytes"):
        mmk.merge_embeddings(text[..., 1:], modal[:, 1:], mask)
    with pytest.raises(mmk.UnsupportedError, match="65 modals, more than 64"):
        mmk.merge_embeddings(text[..., :8], [modal[:, :8]] * 65, mask)
