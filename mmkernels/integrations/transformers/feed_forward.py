"""Feed-forward networks and the ends of blocks, which hundreds of transformers' classes share word for word.

They are known by their forward's source alone, which names nothing but the module's own children: linear layer and
activation become one product, and so do linear layer and residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations._blocks import activated, dropout_p, is_hooked, linear
from mmkernels.integrations._swaps import Swap, SwappedForward

__all__ = ["BY_SOURCE", "feed_forward", "with_residual"]


def _mlp(module: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
    return linear(module.fc2, activated(module.fc1, module.activation_fn, hidden_states), residual=residual)


def _gated_mlp(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    gate = activated(module.gate_proj, module.act_fn, x)
    return linear(module.down_proj, gate * linear(module.up_proj, x), residual=residual)


def with_residual(mlp: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """residual + mlp(x), where the mlp's forward may have been swapped for one of those above."""
    forward = mlp.__dict__.get("forward")
    if isinstance(forward, SwappedForward) and forward.func in (_mlp, _gated_mlp) and not is_hooked(mlp):
        return forward(x, residual=residual)
    return residual + mlp(x)


def _intermediate(module: Any, hidden_states: Tensor) -> Tensor:
    return activated(module.dense, module.intermediate_act_fn, hidden_states)


def _with_residual(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    if dropout_p(module.dropout) == 0.0:
        return linear(module.dense, hidden_states, residual=input_tensor)
    return module.dropout(linear(module.dense, hidden_states)) + input_tensor


def _with_residual_and_norm(module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    return module.LayerNorm(_with_residual(module, hidden_states, input_tensor))


BY_SOURCE: dict[str, Swap] = {
    source: Swap(function, "concat_linear", sources)
    for function, sources in (
        (_mlp, ("2097f227af29",)),
        (_gated_mlp, ("7d2027d4464e",)),
        (_intermediate, ("d60f3781ad76", "19b43971fdbc", "ab3f9454469b")),
        (_with_residual, ("efce4e7b766a", "5dd53483160e")),
        (_with_residual_and_norm, ("c4cade7c3bed", "3799d79263d3")),
    )
    for source in sources
}


def feed_forward(module: Any, residual: Tensor, x: Tensor) -> Tensor:
    """residual + dropout(fc2(dropout(activation_fn(fc1(x))))), of layers with functional dropout."""
    hidden = activated(module.fc1, module.activation_fn, x)
    hidden = torch.nn.functional.dropout(hidden, p=module.activation_dropout, training=module.training)
    if not module.training or module.dropout == 0.0:
        return linear(module.fc2, hidden, residual=residual)
    return residual + torch.nn.functional.dropout(linear(module.fc2, hidden), p=module.dropout)
