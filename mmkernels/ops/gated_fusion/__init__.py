"""Gated multimodal unit: a learned, per-feature mixture of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.gated_fusion.op import gated_fusion_op
from mmkernels.ops.gated_fusion.reference import weighed

__all__ = ["gated_fusion"]


@overload
def gated_fusion(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor] | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    presence: Tensor | None = None,
    return_gate: Literal[False] = False,
) -> Tensor: ...


@overload
def gated_fusion(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor] | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    presence: Tensor | None = None,
    return_gate: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def gated_fusion(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor] | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    *,
    presence: Tensor | None = None,
    return_gate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gated multimodal unit: every output feature mixes the modalities by its own gates, which see all of them.

        h_i = tanh(W_i x_i + b_i),  z = softmax over i of (W_z [x₁; …; x_M] + b_z),  y = Σ_i z_i ∘ h_i

    and for two modalities with gate_weight (N, K) the original form z = σ(W_z [x₁; x₂] + b_z),
    y = z ∘ h₁ + (1 − z) ∘ h₂. Source: Arevalo et al., "Gated Multimodal Units for Information Fusion", 2017
    (arXiv:1702.01992).

    Args:
        xs: M tensors (*, K_i) with the same leading shape, float32, bfloat16, float16, or float64 (reference backend
            alone). Any widths, 0 included. Any strides; a last dim that is not contiguous costs a copy of that tensor.
        value_weights: M tensors W_i (N, K_i).
        value_biases: M tensors b_i (N,), or None.
        gate_weight: W_z, (M·N, K), K = ΣK_i, the rows of one modality after those of another; or (N, K) where M = 2,
            which selects the sigmoid form.
        gate_bias: b_z, (M·N,), or (N,) in the sigmoid form.
        presence: (*, M) or (M,) bool, True where a modality was observed. An absent one counts as zeros in the gates'
            input, whatever it holds, has weight 0, and its gradient is zero. The softmax runs over the present ones; in
            the sigmoid form a modality that is alone has weight 1. Where all are absent the output is 0.
        return_gate: also return what each modality is weighted by. That call is made of `concat_linear`, one for each
            modality and one for the gates, and keeps what they return.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, N); with ``return_gate`` a pair of it and z, (*, M, N), in the sigmoid form z and 1 − z stacked. Both are
        differentiable. z is 0 where a modality is absent, and sums to 1 over the present ones.

    Example:
        >>> plot, poster = torch.randn(8, 300), torch.randn(8, 256)
        >>> weights, gate_weight = [torch.randn(64, 300), torch.randn(64, 256)], torch.randn(64, 556)
        >>> gated_fusion([plot, poster], weights, None, gate_weight).shape
        torch.Size([8, 64])
    """
    if may_use_door() and return_gate is False:
        biases = () if value_biases is None else value_biases
        plain = gated_fusion_op.unchecked(xs, value_weights, biases, gate_weight, gate_bias, presence)
        if plain is not None:
            return plain
    if is_overridden(xs, value_weights, value_biases, gate_weight, gate_bias, presence):
        return overridden_call(gated_fusion, locals())
    name = "gated_fusion"
    first = fusion.first_source(name, xs)
    if checks.autocast_is_on(first.device):
        tensors = (xs, value_weights, value_biases, gate_weight, gate_bias)
        xs, value_weights, value_biases, gate_weight, gate_bias = fusion.autocast(first.device, *tensors)
        first = xs[0]
    lead, width = fusion.check_sources(name, xs)
    count = len(xs)
    _check_list(name, "value_weights", value_weights, count)
    features = fusion.check_weight(name, "value_weights[0]", value_weights[0], first.shape[-1], first)
    for i in range(1, count):
        fusion.check_shaped(name, f"value_weights[{i}]", value_weights[i], (features, xs[i].shape[-1]), first)
    if value_biases is not None:
        _check_list(name, "value_biases", value_biases, count)
        for i in range(count):
            fusion.check_shaped(name, f"value_biases[{i}]", value_biases[i], (features,), first)
    gates = fusion.check_weight(name, "gate_weight", gate_weight, width, first)
    if gates != count * features and (count != 2 or gates != features):
        expected = f"shape {(count * features, width)}" + (f" or {(features, width)}" if count == 2 else "")
        raise checks.value_error(name, "gate_weight", expected, tuple(gate_weight.shape))
    if gate_bias is not None:
        fusion.check_shaped(name, "gate_bias", gate_bias, (gates,), first)
    if presence is not None:
        fusion.check_presence(name, presence, lead, count, first)
    if not isinstance(return_gate, bool):
        raise checks.type_error(name, "return_gate", "a bool", type(return_gate).__name__)
    if return_gate:
        return _with_gate(xs, value_weights, value_biases, gate_weight, gate_bias, presence)
    biases = [] if value_biases is None else list(value_biases)
    return gated_fusion_op(list(xs), list(value_weights), biases, gate_weight, gate_bias, presence)[0]


def _with_gate(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor] | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    presence: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the weights of the modalities."""
    values = []
    for i, (x, weight) in enumerate(zip(xs, value_weights, strict=True)):
        bias = None if value_biases is None else value_biases[i]
        here = None if presence is None else presence[..., i : i + 1]
        values.append(concat_linear([x], weight, bias, activation="tanh", presence=here))
    gate = concat_linear(xs, gate_weight, gate_bias, presence=presence)
    weights, kept = weighed(gate, torch.stack(values, -2), presence)
    return (weights * kept).sum(-2), weights


def _check_list(op: str, argument: str, values: Sequence[Tensor], count: int) -> None:
    if not isinstance(values, (list, tuple)):
        raise checks.type_error(op, argument, "a list of tensors", type(values).__name__)
    if len(values) != count:
        raise checks.value_error(op, argument, f"{count} tensors as in xs", len(values))
