"""concat_linear in plain PyTorch: the specification every kernel is tested against.

    z = [x₁; …; x_M] Wᵀ + b,  y = act(z),  y ← tanh(gate) · y,  y ← residual + y

Runs on every device and dtype, in the inputs' dtype, differentiable any number of times. It builds the concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops._examples import Draw, Examples
from mmkernels.ops._products import linear


def _silu(z: Tensor) -> Tensor:
    """torch's; its first derivative alone carries no tangents, so that where there may be some it is composed."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return F.silu(z)
    return z * torch.sigmoid(z)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": _silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def concat_linear(
    xs: Sequence[Tensor],  # M of [*, K_i]
    weight: Tensor,  # [N, K], K = ΣK_i
    bias: Tensor | None,  # [N]
    activation: str | None,
    presence: Tensor | None,  # [*, M] or [M] bool
    residual: Tensor | None,  # [*, N]
    gate: Tensor | None,  # [] or [N]
) -> Tensor:
    """Output [*, N]."""
    y = activate(projection(xs, weight, bias, presence), activation)
    if gate is not None:
        y = torch.tanh(gate) * y
    return y if residual is None else residual + y


def projection(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, presence: Tensor | None) -> Tensor:
    """z, the linear layer over what is present, [*, N]."""
    return linear(torch.cat(where_present(xs, presence), -1), weight, bias)


def where_present(xs: Sequence[Tensor], presence: Tensor | None) -> list[Tensor]:
    """The modalities, zero where absent, whatever they hold there; so are their gradients."""
    if presence is None:
        return list(xs)
    return [torch.where(presence[..., i : i + 1], x, torch.zeros_like(x)) for i, x in enumerate(xs)]


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation by its name; None is the identity."""
    return z if activation is None else _ACTIVATIONS[activation](z)


def example_inputs(draw: Draw, B: int = 5, K: int = 6, N: int = 7) -> Examples:
    return {
        "all options": {
            "xs": [draw(B, K), draw(B, 3)],
            "weight": draw(N, K + 3),
            "bias": draw(N),
            "activation": "gelu",
            "presence": draw.flags(B, 2),
            "residual": draw(B, N),
            "gate": draw(N),
        },
        "plain": {"xs": [draw(B, K), draw(B, 3)], "weight": draw(N, K + 3)},
        "no activation": {  # its gradient reads no result
            "xs": [draw(B, K), draw(B, 3)],
            "weight": draw(N, K + 3),
            "bias": draw(N),
            "presence": draw.flags(B, 2),
            "residual": draw(B, N),
        },
        "tanh": {  # its gradient reads the output
            "xs": [draw(B, K), draw(B, 3)],
            "weight": draw(N, K + 3),
            "bias": draw(N),
            "activation": "tanh",
        },
        "one absent": {
            "xs": [draw(B, 2, K), draw(B, 2, 3)],
            "weight": draw(N, K + 3),
            "bias": draw(N),
            "presence": torch.tensor([True, False]),
        },
    }
