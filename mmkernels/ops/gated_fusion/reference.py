"""gated_fusion in plain PyTorch: the specification every kernel is tested against.

    h_i = tanh(W_i x_i + b_i),  z = softmax over present i of (W_z [x₁; …; x_M] + b_z),  y = Σ_i z_i ∘ h_i

and for two modalities with one gate per feature z = σ(W_z [x₁; x₂] + b_z), y = z ∘ h₁ + (1 − z) ∘ h₂.

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times. It builds the concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear
from mmkernels.ops.concat_linear.reference import projection, where_present


def gated_fusion(
    xs: Sequence[Tensor],  # M of [*, K_i]
    value_weights: Sequence[Tensor],  # M of [N, K_i]
    value_biases: Sequence[Tensor],  # M of [N], or empty
    gate_weight: Tensor,  # [M·N, K], or [N, K] for the sigmoid form; K = ΣK_i
    gate_bias: Tensor | None,  # [M·N] or [N]
    presence: Tensor | None,  # [*, M] or [M] bool
) -> Tensor:
    """Output [*, N]; zeros where every modality is absent."""
    weights, values = weights_and_values(xs, value_weights, value_biases, gate_weight, gate_bias, presence)
    return (weights * values).sum(-2)


def weights_and_values(
    xs: Sequence[Tensor],
    value_weights: Sequence[Tensor],
    value_biases: Sequence[Tensor],
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    presence: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The weight and the value h of each modality, [*, M, N]; zero where it is absent."""
    biases: list[Tensor | None] = [*value_biases] or [None] * len(xs)
    linears = zip(where_present(xs, presence), value_weights, biases, strict=True)
    values = torch.stack([torch.tanh(linear(x, w, b)) for x, w, b in linears], -2)
    return weighed(projection(xs, gate_weight, gate_bias, presence), values, presence)


def weighed(gate: Tensor, values: Tensor, presence: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight that logits [*, M·N or N] give to each of the values [*, M, N], and the values, zero where absent."""
    count, features = values.shape[-2:]
    absent = None if presence is None else ~presence[..., None]  # [*, M, 1] or [M, 1]
    if count == 2 and gate.shape[-1] == features:
        weights = torch.stack([torch.sigmoid(gate), torch.sigmoid(-gate)], -2)  # σ(−z) = 1 − σ(z)
        if absent is not None:  # the other modality gets it all
            weights = torch.where(absent.flip(-2), torch.ones_like(weights), weights)
    else:
        logits = gate.unflatten(-1, (count, features))
        if absent is not None:  # where all are absent any finite logits will do
            logits = logits.masked_fill(absent & ~absent.all(-2, keepdim=True), -torch.inf)
        weights = torch.softmax(logits, -2)
    if absent is not None:
        weights, values = weights.masked_fill(absent, 0), values.masked_fill(absent, 0)
    return weights, values


def example_inputs(draw: Draw, B: int = 5, K: int = 6, N: int = 7) -> Examples:
    return {
        option: {
            "xs": [draw(B, K), draw(B, 3)],
            "value_weights": [draw(N, K), draw(N, 3)],
            "value_biases": [draw(N), draw(N)] if biases else None,
            "gate_weight": draw(gates * N, K + 3),
            "gate_bias": draw(gates * N) if biases else None,
            "presence": draw.flags(B, 2),
            "return_gate": return_gate,
        }
        for option, gates, biases, return_gate in (
            ("a gate for each", 2, True, False),
            ("no biases", 2, False, False),
            ("the gate", 1, True, True),
        )
    }
