"""Random shapes, strides and options that the CUDA kernels serve. MMKERNELS_FUZZ_EXAMPLES sets how many (60)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CUDA, CUDA_ABSENT, use_implementation
from cuda_cases import schedule
from fusion_cases import ACTIVATIONS
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op

pytestmark = pytest.mark.skipif(CUDA_ABSENT is not None, reason=str(CUDA_ABSENT))

Call = tuple[Callable[..., Any], list[Any], dict[str, Any]]
length = st.one_of(st.integers(0, 20), st.integers(0, 200))


class Tensors:
    """Draws tensors of one 16-bit dtype whose rows begin at multiples of 16 bytes, some permuted or with gaps."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def __call__(self, *shape: int, gain: float = 1.0) -> Tensor:
        tensor = (self.values(*shape) * gain).to(self.dtype)
        leading = len(shape) - 1
        if leading > 0 and self.draw(st.booleans()):
            order = [*self.draw(st.permutations(range(leading))), leading]
            gap = 8 * self.draw(st.integers(0, 2))
            source = tensor.permute(order)
            wide = torch.full((*source.shape[:-1], shape[-1] + gap), torch.nan, dtype=self.dtype)
            wide[..., : shape[-1]] = source
            tensor = wide[..., : shape[-1]].permute([order.index(d) for d in range(leading + 1)])
        return tensor.requires_grad_(self.draw(st.booleans()))

    def optional(self, *shape: int) -> Tensor | None:
        return self(*shape) if self.draw(st.booleans()) else None

    def width(self, most: int = 20) -> int:
        return 8 * self.draw(st.integers(1, most))


@st.composite
def attentions(draw: st.DrawFn) -> Call:
    tensors = Tensors(draw)
    batch, heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    dim = draw(st.sampled_from((8, 32, 40, 64, 88, 128, 136)))
    queries, keys = draw(length), draw(st.integers(1, 130 if dim <= 128 else 90))
    inputs = [tensors(batch, heads * g, n, dim) for g, n in ((group, queries), (1, keys), (1, keys))]
    options: dict[str, Any] = {"enable_gqa": True, "return_lse": draw(st.booleans())}
    kind = draw(st.sampled_from(("none", "none", "bool", "same", "float32")))
    if kind != "none":
        full = (batch, heads * group, queries, keys)
        mask = tensors.values(*(n if draw(st.booleans()) else 1 for n in full))
        if kind == "bool":
            options["attn_mask"] = mask > draw(st.sampled_from((-1.0, 0.0, 1.0)))
        else:
            mask = mask.masked_fill(mask > draw(st.sampled_from((0.5, 9.0))), -torch.inf)
            mask = mask.to(tensors.dtype if kind == "same" else torch.float32)
            options["attn_mask"] = mask.requires_grad_(draw(st.booleans()))
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor(draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)))
    options["scale"] = draw(st.sampled_from((None, None, 0.3, -0.1)))
    return mmk.cross_attention, inputs, options


@st.composite
def joint_attentions(draw: st.DrawFn) -> Call:
    tensors = Tensors(draw)
    batch, heads, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((16, 64, 96)))
    queries, keys = (draw(st.lists(st.integers(0, 60), min_size=1, max_size=4)) for _ in range(2))
    keys[0] += 1
    inputs = [[tensors(batch, heads, n, dim) for n in lengths] for lengths in (queries, keys, keys)]
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        bias = tensors.values(heads, len(queries), len(keys))
        bias = bias.masked_fill(bias > draw(st.sampled_from((0.5, 9.0))), -torch.inf)
        options["stream_bias"] = bias.requires_grad_(draw(st.booleans()))
    return mmk.joint_attention, inputs, options


@st.composite
def linears(draw: st.DrawFn) -> Call:
    tensors = Tensors(draw)
    rows, features, count = draw(length), tensors.width(), draw(st.integers(1, 4))
    widths = [tensors.width() for _ in range(count)]
    xs, weight = [tensors(rows, k) for k in widths], tensors(features, sum(widths), gain=sum(widths) ** -0.5)
    # The derivative of relu is a step: what rounds to the other side of it is no error of the kernel.
    options: dict[str, Any] = {"activation": draw(st.sampled_from([a for a in ACTIVATIONS if a != "relu"]))}
    if draw(st.booleans()):
        options |= {"norm": draw(st.sampled_from(("layer", "rms"))), "eps": 0.01}
        norm = tensors(sum(widths)), tensors.optional(sum(widths))
        return mmk.concat_norm_linear, [xs, *norm, weight, tensors.optional(features)], options
    shape = draw(st.sampled_from((None, (count,), (rows, count))))
    options["presence"] = None if shape is None else torch.rand(shape, generator=tensors.generator) > 0.4
    options |= {"residual": tensors.optional(rows, features), "gate": tensors.optional(features)}
    return mmk.concat_linear, [xs, weight, tensors.optional(features)], options


@st.composite
def rows(draw: st.DrawFn) -> Call:
    tensors = Tensors(draw)
    batch, tokens, features = draw(st.integers(0, 4)), draw(length), tensors.width(most=40)
    norm = draw(st.sampled_from((None, "layer", "rms")))
    options: dict[str, Any] = {"norm": norm}
    options |= {n: tensors.optional(features) if norm else None for n in ("norm_weight", "norm_bias")}
    op = draw(st.sampled_from(("modulated_norm", "concat_tokens", "merge_embeddings")))
    if op == "modulated_norm":
        shapes = st.sampled_from(((batch,), (1,), (batch, tokens), (1, tokens)))
        inputs = [tensors(batch, tokens, features), *(tensors(*draw(shapes), features) for _ in range(2))]
        return mmk.modulated_norm, inputs, options
    if op == "concat_tokens":
        lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        options["type_embedding"] = tensors.optional(len(lengths), features)
        options["position_embeddings"] = [tensors.optional(n, features) for n in lengths]
        return mmk.concat_tokens, [[tensors(batch, n, features) for n in lengths]], options
    mask = torch.rand(batch, tokens, generator=tensors.generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    first = draw(st.integers(0, int(mask.sum())))
    modals = [tensors(n, features) for n in (first, int(mask.sum()) - first)]
    return mmk.merge_embeddings, [tensors(batch, tokens, features), modals, mask], {}


KINDS = {"attention": attentions(), "joint attention": joint_attentions(), "linear": linears(), "rows": rows()}


@pytest.mark.parametrize("kind", KINDS)
@fuzz(60)
@given(st.data(), st.integers(0, 9))
def test_any_call_obeys_the_precision_rule_in_any_order(kind: str, data: st.DataObject, seed: int) -> None:
    function, inputs, options = data.draw(KINDS[kind])
    for backend in use_implementation(CUDA):
        with schedule(seed):
            check_op(function, *inputs, backend=backend, **options)
