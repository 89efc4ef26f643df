"""modulated_norm: normalisation whose scale and shift come from a condition."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops._norm import check_norm
from mmkernels.ops.modulated_norm.op import modulated_norm_op

_NAME = "modulated_norm"


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    norm: Literal["layer", "rms"] | None = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Modulate tokens by a condition: norm(x) ∘ (1 + scale) + shift.

    adaLN of `DiT <https://arxiv.org/abs/2212.09748>`_; with ``norm=None``, `FiLM <https://arxiv.org/abs/1709.07871>`_.

    Args:
        x: (B, L, C) float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim that is
            not contiguous costs a copy of that tensor.
        shift: (B, C), one for all tokens of a batch element, or (B, L, C); every dim but the last may be 1. Of x's
            dtype and device, as all tensors here.
        scale: as shift; the two may have different shapes.
        norm: "layer": (x − mean) / √(variance + eps); "rms": x / √(mean x² + eps); over C. None: x.
        norm_weight: (C,), multiplies the normalised row; absent: 1. Only with a norm.
        norm_bias: (C,), added to the normalised and weighted row; absent: 0. Only with a norm.
        eps: see norm.

    Returns:
        (B, L, C), contiguous. Statistics are float32 for every dtype, taken from the centred row.

    Under autocast, tensors of different dtypes are promoted to the widest, as torch's own norms and products are.

    Example:
        >>> image, shift, scale = torch.randn(4, 256, 1152), torch.randn(4, 1152), torch.randn(4, 1152)
        >>> modulated_norm(image, shift, scale).shape
        torch.Size([4, 256, 1152])
    """
    if may_use_door():
        plain = modulated_norm_op.unchecked(x, shift, scale, norm, norm_weight, norm_bias, eps)
        if plain is not None:
            return plain
    if is_overridden(x, shift, scale, norm_weight, norm_bias):
        return overridden_call(modulated_norm, locals())
    for argument, tensor in (("x", x), ("shift", shift), ("scale", scale)):
        checks.check_tensor(_NAME, argument, tensor)
    if x.dim() != 3:
        raise checks.value_error(_NAME, "x", "3 dims (B, L, C)", f"shape {tuple(x.shape)}")
    if checks.autocast_is_on(x.device):
        x, shift, scale, norm_weight, norm_bias = checks.autocast_promoted(x, shift, scale, norm_weight, norm_bias)
    if x.dtype not in checks.FLOATING:
        raise checks.type_error(_NAME, "x", "dtype float32, bfloat16, float16 or float64", x.dtype)
    checks.check_same_kind(_NAME, x, "x", shift=shift, scale=scale)
    eps = check_norm(_NAME, norm, norm_weight, norm_bias, eps, x.shape[2], x)
    shift, scale = _per_token("shift", shift, x), _per_token("scale", scale, x)
    if shift.shape[1] != scale.shape[1]:
        shift, scale = shift.expand(x.shape), scale.expand(x.shape)
    (out,) = modulated_norm_op(x, shift, scale, norm, norm_weight, norm_bias, float(eps))
    return out


def _per_token(argument: str, tensor: Tensor, x: Tensor) -> Tensor:
    """As (B, 1, C) or (B, L, C), without a copy."""
    batch, length, features = x.shape
    full = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
    if (
        full.dim() != 3
        or full.shape[2] != features
        or (full.shape[0] != batch and full.shape[0] != 1)
        or (full.shape[1] != length and full.shape[1] != 1)
    ):
        expected = f"shape ({batch}, {features}) or ({batch}, {length}, {features}), every dim but the last possibly 1"
        raise checks.value_error(_NAME, argument, expected, tuple(tensor.shape))
    return full if full.shape[0] == batch else full.expand(batch, -1, -1)
