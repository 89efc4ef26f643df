"""Random shapes, strides, masks and flags. MMKERNELS_FUZZ_EXAMPLES sets how many (300)."""

from __future__ import annotations

from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op

small, length, features = st.integers(1, 3), st.integers(0, 140), st.integers(1, 70)


@st.composite
def arranged(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values in another memory layout: permuted, with gaps, from an odd offset, with a strided last dim."""
    order = draw(st.permutations((0, 1, 2)))
    storage = tensor.permute(*order, 3)
    gap, offset = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    wide = torch.full((*storage.shape[:3], storage.shape[3] + gap), 77.0, dtype=tensor.dtype)
    flat = torch.cat([wide.new_zeros(offset), wide.flatten()])[offset:].view(wide.shape)
    flat[..., : storage.shape[3]] = storage
    back = [order.index(i) for i in range(3)]
    result = flat[..., : storage.shape[3]].permute(*back, 3)
    return result.mT.contiguous().mT if draw(st.integers(0, 9)) == 0 else result


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    batch, kv_heads, group = draw(small), draw(small), draw(small)
    query_len = draw(st.one_of(length, st.integers(0, 16)))
    key_len = draw(st.one_of(length, st.integers(0, 600)))
    dim, value_dim = draw(features), draw(features)
    gain = draw(st.sampled_from((0.0, 1.0, 1.0, 8.0)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = draw(arranged((random(batch, kv_heads * group, query_len, dim) * gain).to(dtype)))
    k = draw(arranged(random(batch, kv_heads, key_len, dim).to(dtype)))
    v = draw(arranged(random(batch, kv_heads, key_len, value_dim).to(dtype)))
    inputs = [x.requires_grad_(draw(st.booleans())) for x in (q, k, v)]
    options: dict[str, Any] = {"enable_gqa": True, "return_lse": draw(st.booleans())}
    for argument, kinds in (
        ("attn_mask", ("none", "bool", "float", "float32")),
        ("attn_bias", ("none", "none", "float")),
    ):
        kind = draw(st.sampled_from(("none", *kinds)))
        if kind == "none":
            continue
        full = (batch, kv_heads * group, query_len, key_len)
        shape = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, 2)) :]
        mask = random(*shape)
        if kind == "bool":
            options[argument] = mask > draw(st.sampled_from((-1.0, 0.0, 1.0)))
        else:
            mask = mask.masked_fill(mask > draw(st.sampled_from((0.5, 1.5, 9.0))), -torch.inf)
            mask = mask.to(dtype if kind == "float" else torch.float32)
            options[argument] = mask.requires_grad_(draw(st.booleans()))
    if draw(st.integers(0, 2)) == 0:
        sinks = random(kv_heads * group) * draw(st.sampled_from((1.0, 8.0)))
        options["sinks"] = sinks.to(draw(st.sampled_from((dtype, torch.float32)))).requires_grad_(draw(st.booleans()))
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor(draw(st.lists(st.integers(0, key_len), min_size=batch, max_size=batch)))
    if draw(st.booleans()):
        options["window"] = (draw(st.integers(-1, 50)), draw(st.integers(-1, 50)))
    options["is_causal"] = draw(st.booleans())
    options["causal_alignment"] = draw(st.sampled_from(("top_left", "bottom_right")))
    options["softcap"] = draw(st.sampled_from((0.0, 0.0, 2.0, 30.0)))
    options["scale"] = draw(st.sampled_from((None, None, 0.3, -0.1)))
    options["dropout_p"] = draw(st.sampled_from((0.0, 0.0, 0.0, 0.2, 0.9)))
    return inputs, options


@fuzz(300)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Tensor], dict[str, Any]], implementation: Any) -> None:
    inputs, options = call
    for backend in use_implementation(implementation):
        check_op(mmk.cross_attention, *inputs, backend=backend, **options)
