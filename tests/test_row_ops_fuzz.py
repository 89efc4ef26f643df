"""Random shapes, strides, norms and absent arguments for the row ops. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from row_ops import strided
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op

any_call = fuzz(100)
implementations = st.sampled_from(FUZZED)
length = st.one_of(st.integers(0, 9), st.integers(100, 300))


class Tensors:
    """Draws tensors of one dtype, some strided, some without gradient."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
        self.features = draw(st.one_of(st.integers(1, 70), st.sampled_from((512, 1000, 2100))))

    def __call__(self, *shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=self.generator).to(self.dtype)
        tensor.requires_grad_(self.draw(st.booleans()))
        return strided(tensor) if self.draw(st.integers(0, 3)) == 0 else tensor

    def affine(self, norm: str | None) -> dict[str, Any]:
        names = [n for n in ("norm_weight", "norm_bias") if norm and self.draw(st.booleans())]
        return {"norm": norm, **{name: self(self.features) for name in names}}


@st.composite
def modulations(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    tensors = Tensors(draw)
    batch, tokens = draw(st.integers(0, 3)), draw(length)
    shapes = st.sampled_from(((batch,), (1,), (batch, tokens), (batch, 1), (1, tokens)))
    condition = [tensors(*draw(shapes), tensors.features) for _ in range(2)]
    norm = draw(st.sampled_from((None, "layer", "rms")))
    return [tensors(batch, tokens, tensors.features), *condition], tensors.affine(norm)


@st.composite
def concatenations(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    tensors = Tensors(draw)
    batch = draw(st.one_of(st.integers(0, 9), st.sampled_from((130, 300))))
    lengths = draw(st.lists(st.integers(0, 9) if batch > 9 else length, min_size=1, max_size=3))
    options = tensors.affine(draw(st.sampled_from((None, "layer", "rms"))))
    if draw(st.booleans()):
        options["type_embedding"] = tensors(len(lengths), tensors.features)
    if draw(st.booleans()):
        options["position_embeddings"] = [
            tensors(n, tensors.features) if draw(st.booleans()) else None for n in lengths
        ]
    return [[tensors(batch, n, tensors.features) for n in lengths]], options


@st.composite
def merges(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    tensors = Tensors(draw)
    batch, tokens = draw(st.integers(0, 3)), draw(length)
    mask = torch.rand(batch, tokens, generator=tensors.generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    first = draw(st.integers(0, int(mask.sum())))
    counts = (first, int(mask.sum()) - first)
    modals = [tensors(n, tensors.features) for n in counts]
    return [tensors(batch, tokens, tensors.features), modals, mask], {}


@any_call
@given(modulations(), implementations)
def test_any_modulation_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    for backend in use_implementation(implementation):
        check_op(mmk.modulated_norm, *call[0], backend=backend, **call[1])


@any_call
@given(concatenations(), implementations)
def test_any_concatenation_obeys_the_precision_rule(
    call: tuple[list[Any], dict[str, Any]], implementation: Any
) -> None:
    for backend in use_implementation(implementation):
        check_op(mmk.concat_tokens, *call[0], backend=backend, **call[1])


@any_call
@given(merges(), implementations)
def test_any_merge_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    for backend in use_implementation(implementation):
        check_op(mmk.merge_embeddings, *call[0], backend=backend, **call[1])
