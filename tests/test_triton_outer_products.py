"""The Triton kernels of low_rank_fusion, tensor_fusion_linear and bilinear_fusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import op_contract as contract
import pytest
import torch
from environment import DEVICE
from fusion_cases import each_dtype, leaf
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op, poisoned_memory


def tensor_fusion_inputs(
    rows: int, widths: Sequence[int], features: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    entries = math.prod(w + 1 for w in widths)
    xs = [leaf(rows, w, dtype=dtype) for w in widths]
    return xs, leaf(features, entries, dtype=dtype, gain=entries**-0.5), leaf(features, dtype=dtype)


def low_rank_inputs(
    rows: int, widths: Sequence[int], features: int, dtype: torch.dtype, ranks: int = 3
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    xs = [leaf(rows, w, dtype=dtype) for w in widths]
    factors = [leaf(ranks, w + 1, features, dtype=dtype, gain=(w + 1) ** -0.5) for w in widths]
    return xs, factors, leaf(ranks, dtype=dtype), leaf(features, dtype=dtype)


def bilinear_inputs(
    rows: int, widths: Sequence[int], features: int, dtype: torch.dtype, rank: int = 1
) -> tuple[Tensor, ...]:
    weights = [leaf(rank * features, w, dtype=dtype, gain=w**-0.5) for w in widths]
    return (*(leaf(rows, w, dtype=dtype) for w in widths), *weights)


# rows, widths, outputs
SHAPES = {
    "one row": (1, (20, 5), 33),
    "rows of several tiles": (70, (17, 7), 65),
    "three modalities": (33, (9, 6, 5), 17),
    "an empty modality": (5, (8, 0, 3), 20),
    "a modality of several blocks of columns": (3, (130, 1), 16),
    "no rows": (0, (4, 3), 8),
}


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("op", "make"),
    [(mmk.tensor_fusion_linear, tensor_fusion_inputs), (mmk.low_rank_fusion, low_rank_inputs)],
    ids=["tensor_fusion_linear", "low_rank_fusion"],
)
def test_outputs_and_gradients_match_the_oracle(
    op: Callable[..., Tensor], make: Callable[..., tuple], shape: str, dtype: torch.dtype, triton_backend: str
) -> None:
    with poisoned_memory():
        check_op(op, *make(*SHAPES[shape], dtype), backend=triton_backend)


@each_dtype
@pytest.mark.parametrize(("rows", "features", "rank"), [(1, 5, 3), (70, 66, 2), (17, 8, 1), (0, 4, 2)])
def test_bilinear_fusion_matches_the_oracle(
    rows: int, features: int, rank: int, dtype: torch.dtype, triton_backend: str
) -> None:
    inputs = bilinear_inputs(rows, (35, 70), features, dtype, rank)
    with poisoned_memory():
        check_op(mmk.bilinear_fusion, *inputs, backend=triton_backend, rank=rank)


def as_function(op: Callable[..., Tensor], inputs: Sequence) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as a function of its leaves alone."""
    lists = [len(x) if isinstance(x, list) else None for x in inputs]

    def function(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return op(*([next(given) for _ in range(n)] if n is not None else next(given) for n in lists))

    return function, [t for x in inputs for t in (x if isinstance(x, list) else [x])]


@pytest.mark.parametrize(
    ("op", "make"),
    [
        (mmk.tensor_fusion_linear, tensor_fusion_inputs),
        (mmk.low_rank_fusion, low_rank_inputs),
        (mmk.bilinear_fusion, bilinear_inputs),
    ],
    ids=["tensor_fusion_linear", "low_rank_fusion", "bilinear_fusion"],
)
def test_gradients_are_the_same_alone_with_any_strides_and_every_time(
    op: Callable[..., Tensor], make: Callable[..., tuple], triton_backend: str
) -> None:
    function, leaves = as_function(op, make(35, (6, 5), 18, torch.float32))
    contract.check_each_gradient_alone(function, leaves)
    contract.check_strides(function, leaves)
    contract.check_threads_and_runs_agree(function, leaves)


def test_every_call_is_served() -> None:
    for op, make in ((mmk.tensor_fusion_linear, tensor_fusion_inputs), (mmk.low_rank_fusion, low_rank_inputs)):
        explained = mmk.explain(op, *make(4, (3, 2, 1, 2), 8, torch.float32))
        assert explained.backend == ("cpu" if DEVICE == "cpu" else "triton")
        with mmk.use_backend("triton"):
            assert mmk.explain(op, *make(4, (3, 2, 1, 2), 8, torch.float32)).backend == "triton"
