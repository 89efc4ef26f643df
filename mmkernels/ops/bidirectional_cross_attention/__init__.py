"""Attention in both directions between two sequences, over one matrix of scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops.bidirectional_cross_attention.op import bidirectional_cross_attention_op

__all__ = ["bidirectional_cross_attention"]

_NAME = "bidirectional_cross_attention"


def bidirectional_cross_attention(
    x_query: Tensor,
    y_key: Tensor,
    x_value: Tensor,
    y_value: Tensor,
    *,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    scale: float | None = None,
    clamp: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Two sequences that attend to each other by the same scores, which are formed once and never held.

        S = scale · x_query y_keyᵀ, clamped to ±clamp
        x_out = softmax over y of S · y_value,   y_out = softmax over x of Sᵀ · x_value

    The fusion of image and text of Li et al., "Grounded Language-Image Pre-training", 2021 (arXiv:2112.03857), and of
    Grounding DINO (arXiv:2303.05499). The lengths may differ by orders of magnitude.

    Args:
        x_query: (B, H, Lx, D), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last
            dim that is not contiguous costs a copy of that tensor.
        y_key: (B, H, Ly, D).
        x_value: (B, H, Lx, Dv).
        y_value: (B, H, Ly, Dv).
        x_mask: (B, Lx) bool, True = a real token: y attends to no other. None = all are.
        y_mask: (B, Ly) bool, the same for y.
        scale: factor of the scores; None = 1/√D.
        clamp: bound ≥ 0 of the scores, both signs, before either softmax; None = off.

    All floating tensors have one dtype, all tensors one device. Under autocast, floating inputs are cast as torch's own
    attention casts them.

    Returns:
        x_out (B, H, Lx, Dv) and y_out (B, H, Ly, Dv), in the memory order of x_query and y_key.

    A padded token attends to the other side as a real one does, and what is not finite in it counts as zero, so that
    nothing of it reaches another token. Where the other side has no real token, outputs and gradients are 0.

    Example:
        >>> image, text = torch.randn(2, 4, 900, 64), torch.randn(2, 4, 32, 64)
        >>> [x.shape for x in bidirectional_cross_attention(image, text, image, text)]
        [torch.Size([2, 4, 900, 64]), torch.Size([2, 4, 32, 64])]
    """
    if may_use_door():
        outputs = bidirectional_cross_attention_op.unchecked(
            x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp
        )
        if outputs is not None:
            return outputs[0], outputs[1]
    if is_overridden(x_query, y_key, x_value, y_value, x_mask, y_mask):
        return overridden_call(bidirectional_cross_attention, locals())
    checks.check_tensor(_NAME, "x_query", x_query)
    others = {"y_key": y_key, "x_value": x_value, "y_value": y_value}
    for argument, tensor in others.items():
        checks.check_tensor(_NAME, argument, tensor)
    if checks.autocast_is_on(x_query.device):
        tensors = checks.autocast_inputs(x_query.device, x_query, y_key, x_value, y_value)
        x_query, y_key, x_value, y_value = tensors
        others = {"y_key": y_key, "x_value": x_value, "y_value": y_value}
    if x_query.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "x_query", "dtype float32, bfloat16, float16 or float64", x_query.dtype)
    checks.check_same_kind(_NAME, x_query, "x_query", **others)
    if x_query.dim() != 4:
        raise checks.value_error(_NAME, "x_query", "4 dims (B, H, Lx, D)", f"shape {tuple(x_query.shape)}")
    batch, heads, x_length, features = x_query.shape
    _check_shape("y_key", y_key, (batch, heads, "Ly", features))
    _check_shape("x_value", x_value, (batch, heads, x_length, "Dv"))
    _check_shape("y_value", y_value, (batch, heads, y_key.shape[2], x_value.shape[3]))
    checks.check_count(_NAME, "y_key", "scores", batch, heads, x_length, y_key.shape[2])
    _check_mask("x_mask", x_mask, x_query)
    _check_mask("y_mask", y_mask, y_key)
    if scale is not None:
        scale = checks.check_number(_NAME, "scale", scale)
    if clamp is not None:
        clamp = checks.check_number(_NAME, "clamp", clamp)
        if not 0.0 <= clamp < math.inf:
            raise checks.value_error(_NAME, "clamp", "a finite number ≥ 0, or None", clamp)
    x_out, y_out = bidirectional_cross_attention_op(x_query, y_key, x_value, y_value, x_mask, y_mask, scale, clamp)
    return x_out, y_out


def _check_shape(argument: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Names in ``shape`` are sizes that may be any."""
    if tensor.dim() != len(shape) or any(
        not isinstance(want, str) and size != want for size, want in zip(tensor.shape, shape, strict=True)
    ):
        expected = ", ".join(str(size) for size in shape)
        raise checks.value_error(_NAME, argument, f"shape ({expected})", tuple(tensor.shape))


def _check_mask(argument: str, mask: Tensor | None, tokens: Tensor) -> None:
    if mask is None:
        return
    checks.check_tensor(_NAME, argument, mask)
    if mask.dtype != torch.bool:
        raise checks.type_error(_NAME, argument, "dtype torch.bool", mask.dtype)
    checks.check_same_device(_NAME, argument, mask, "x_query", tokens.device)
    expected = (tokens.shape[0], tokens.shape[2])
    if mask.shape != expected:
        raise checks.value_error(_NAME, argument, f"shape {expected}", tuple(mask.shape))
