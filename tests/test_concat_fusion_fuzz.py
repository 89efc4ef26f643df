"""Random shapes, strides and options of the concatenation-fusion ops. MMKERNELS_FUZZ_EXAMPLES sets how many (100)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import FUZZED, use_implementation
from fusion_cases import ACTIVATIONS
from fuzzing import fuzz, long_sizes
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels as mmk
from mmkernels.testing import check_op

Call = tuple[Callable[..., Tensor], list[Any], dict[str, Any]]


@st.composite
def arranged(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The same values, perhaps permuted in memory, with gaps or from an odd offset, and perhaps requiring grad."""
    layout = draw(st.sampled_from(("dense", "dense", "gaps", "permuted", "offset")))
    if layout == "gaps" and tensor.dim() > 0:
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 77.0).to(tensor.dtype)
        wide[..., 1:-2] = tensor
        tensor = wide[..., 1:-2]
    elif layout == "permuted" and tensor.dim() > 1:
        order = draw(st.permutations(range(tensor.dim())))
        tensor = tensor.permute(*order).contiguous().permute(*(order.index(i) for i in range(tensor.dim())))
    elif layout == "offset":
        tensor = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor.requires_grad_(draw(st.booleans())) if tensor.is_floating_point() else tensor


@st.composite
def calls(draw: st.DrawFn) -> Call:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    size = st.one_of(st.integers(0, 4), st.integers(0, 150))
    lead = tuple(draw(st.one_of(st.lists(st.integers(0, 6), max_size=3), st.lists(size, min_size=1, max_size=1))))
    op = draw(st.sampled_from(("concat_linear", "concat_norm_linear", "gated_fusion", "gated_concat")))
    count = 2 if op == "gated_concat" else draw(st.integers(1, 5))
    long = draw(long_sizes(("rows", "width", "features"), 2_000_000))
    size = st.integers(0, 4) if long else size
    lead = (long.get("rows", draw(size)),) if long else lead
    widths = [long.get("width", draw(size)), *(draw(size) for _ in range(count - 1))]
    width, features = sum(widths), long.get("features", draw(size))

    def random(*shape: int, gain: float = 1.0) -> Tensor:
        return draw(arranged((torch.randn(shape, generator=generator) * gain).to(dtype)))

    def optional(*shape: int) -> Tensor | None:
        return random(*shape) if draw(st.booleans()) else None

    def presence() -> Tensor | None:
        shape = draw(st.sampled_from((None, (count,), (*lead, count))))
        return None if shape is None else draw(arranged(torch.rand(shape, generator=generator) > 0.4))

    xs = [random(*lead, k) for k in widths]
    gain = max(width, 1) ** -0.5
    options: dict[str, Any]
    if op == "concat_linear":
        weight, bias = random(features, width, gain=gain), optional(features)
        options = {"activation": draw(st.sampled_from(ACTIVATIONS)), "presence": presence()}
        options |= {"residual": optional(*lead, features), "gate": optional(*draw(st.sampled_from(((), (features,)))))}
        return mmk.concat_linear, [xs, weight, bias], options
    if op == "concat_norm_linear":
        norm, linear = (random(width), optional(width)), (random(features, width, gain=gain), optional(features))
        # A row of one or two features has a variance near 0, and gradients that are rounding divided by it: of one
        # feature plain torch's are 0, ours about 1e-6.
        assume(width != 1)
        options = {"norm": draw(st.sampled_from(("layer", "rms"))), "eps": draw(st.sampled_from((0.01, 1.0)))}
        return (
            mmk.concat_norm_linear,
            [xs, *norm, *linear],
            options | {"activation": draw(st.sampled_from(ACTIVATIONS))},
        )
    if op == "gated_fusion":
        gates = features * (1 if count == 2 and draw(st.booleans()) else count)
        biases = [random(features) for _ in widths] if draw(st.booleans()) else None
        values = [random(features, k, gain=max(k, 1) ** -0.5) for k in widths]
        gate = random(gates, width, gain=gain), optional(gates)
        return mmk.gated_fusion, [xs, values, biases, *gate], {"presence": presence()}
    gates = draw(st.sampled_from((1, widths[0])))
    return mmk.gated_concat, [*xs, random(gates, width, gain=gain), optional(gates)], {}


@fuzz(100)
@given(calls(), st.sampled_from(FUZZED))
def test_any_call_obeys_the_precision_rule(call: Call, implementation: Any) -> None:
    function, inputs, options = call
    for backend in use_implementation(implementation):
        check_op(function, *inputs, backend=backend, **options)
