"""Random numbers of streams, lengths, layouts and biases. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

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

length = st.one_of(st.integers(0, 5), st.integers(0, 120))
streams = st.lists(length, min_size=1, max_size=4)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    batch, key_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2)))
    heads = key_heads * group
    dim, value_dim = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    query_lengths, key_lengths = draw(streams), draw(streams)

    def stream(count: int, features: int, heads: int = key_heads) -> Tensor:
        tensor = torch.randn(batch, heads, count, features, generator=generator).to(dtype)
        tensor.requires_grad_(draw(st.booleans()))
        return strided(tensor) if draw(st.integers(0, 3)) == 0 else tensor

    inputs = [
        [stream(n, dim, heads) for n in query_lengths],
        [stream(n, dim) for n in key_lengths],
        [stream(n, value_dim) for n in key_lengths],
    ]
    options: dict[str, Any] = {"return_lse": draw(st.booleans())}
    if draw(st.booleans()):
        options["key_lengths"] = [
            torch.tensor(draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch)), dtype=torch.int64)
            if draw(st.booleans())
            else None
            for n in key_lengths
        ]
    if draw(st.booleans()):
        shape = (len(query_lengths), len(key_lengths))
        bias = torch.randn((heads, *shape) if draw(st.booleans()) else shape, generator=generator)
        bias = bias.masked_fill(bias > draw(st.sampled_from((0.5, 9.0))), -torch.inf)
        bias = bias.to(draw(st.sampled_from((dtype, torch.float32))))
        options["stream_bias"] = bias.requires_grad_(draw(st.booleans()))
    options["softcap"] = draw(st.sampled_from((0.0, 0.0, 2.0)))
    options["enable_gqa"] = group > 1 or draw(st.booleans())
    options["dropout_p"] = draw(st.sampled_from((0.0, 0.0, 0.3)))
    options["scale"] = draw(st.sampled_from((None, None, 0.3, -0.1)))
    return inputs, options


def outputs(*args: Any, **options: Any) -> list[Tensor]:
    result = mmk.joint_attention(*args, **options)
    return [*result[0], *result[1]] if isinstance(result, tuple) else result


def means_terms(values: list[Tensor]) -> float:
    """Those of a mean of values: of both signs, many nearly cancel."""
    return max((float(v.detach().abs().mean()) for v in values if v.numel() > 0), default=0.0)


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: tuple[list[Any], dict[str, Any]], implementation: Any) -> None:
    inputs, options = call
    if implementation.backend == "triton" and max(len(inputs[0]), len(inputs[1])) > 1:
        options["dropout_p"] = 0.0  # whose kernels count it within a stream
    for backend in use_implementation(implementation):
        check_op(outputs, *inputs, backend=backend, terms=means_terms(inputs[2]), **options)
