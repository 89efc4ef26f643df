"""Feed-forward networks and the ends of blocks, which hundreds of transformers' classes share word for word.

They are known by their forward's source alone, which names nothing but the module's own children: linear layer and
activation become one product, and so do linear layer and residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations._blocks import activation_name, dropout_p, linear
from mmkernels.integrations._swaps import Swap

__all__ = ["BY_SOURCE", "feed_forward"]


def _activated(child: Any, activation: Any, x: Tensor) -> Tensor:
    """activation(child(x))"""
    name = activation_name(activation)
    return activation(linear(child, x)) if name is None else linear(child, x, activation=name)


def _mlp(module: Any, hidden_states: Tensor) -> Tensor:
    return linear(module.fc2, _activated(module.fc1, module.activation_fn, hidden_states))


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    gate = _activated(module.gate_proj, module.act_fn, x)
    return linear(module.down_proj, gate * linear(module.up_proj, x))


def _intermediate(module: Any, hidden_states: Tensor) -> Tensor:
    return _activated(module.dense, module.intermediate_act_fn, hidden_states)


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


def feed_forward(module: Any, x: Tensor) -> Tensor:
    """x + dropout(fc2(dropout(activation_fn(fc1(x))))), of layers with functional dropout."""
    hidden = _activated(module.fc1, module.activation_fn, x)
    hidden = torch.nn.functional.dropout(hidden, p=module.activation_dropout, training=module.training)
    if not module.training or module.dropout == 0.0:
        return linear(module.fc2, hidden, residual=x)
    return x + torch.nn.functional.dropout(linear(module.fc2, hidden), p=module.dropout)
