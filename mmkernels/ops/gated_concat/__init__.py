"""Concatenation of two modalities, the first gated by both."""

from __future__ import annotations

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.gated_concat.op import gated_concat_op

__all__ = ["gated_concat"]


def gated_concat(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Concatenation whose first modality is gated by both, and the gated sum of its features.

        g = σ([x; y] Wᵀ + b),  out = [g ∘ x; y; s],  s = Σ_k g_k x_k

    Args:
        x: (*, Kx), float32, bfloat16, float16, or float64 (reference backend alone). Any strides; a last dim that is
            not contiguous costs a copy of that tensor.
        y: (*, Ky), with the leading shape of x.
        weight: (Kx, Kx + Ky), a gate per feature of x; or (1, Kx + Ky), one gate for all of them.
        bias: (Kx,) or (1,), as many as the gates.

    All tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, Kx + Ky + 1).

    Example:
        >>> text, image = torch.randn(8, 64), torch.randn(8, 32)
        >>> gated_concat(text, image, torch.randn(64, 96)).shape
        torch.Size([8, 97])
    """
    if may_use_door():
        plain = gated_concat_op.unchecked(x, y, weight, bias)
        if plain is not None:
            return plain
    if is_overridden(x, y, weight, bias):
        return overridden_call(gated_concat, locals())
    name = "gated_concat"
    checks.check_tensor(name, "x", x)
    checks.check_tensor(name, "y", y)
    if checks.autocast_is_on(x.device):
        x, y, weight, bias = fusion.autocast(x.device, x, y, weight, bias)
    if x.dtype not in checks.FLOATING:
        raise checks.type_error(name, "x", "dtype float32, bfloat16, float16 or float64", x.dtype)
    if x.dim() == 0:
        raise checks.value_error(name, "x", "at least 1 dim (*, Kx)", "a scalar")
    lead, width = x.shape[:-1], x.shape[-1]
    fusion.check_kind(name, "y", y, x, "x")
    if y.dim() == 0 or y.shape[:-1] != lead:
        raise checks.value_error(name, "y", f"shape {fusion.shape_text((*lead, 'Ky'))}", tuple(y.shape))
    checks.check_tensor(name, "weight", weight)
    fusion.check_kind(name, "weight", weight, x, "x")
    both = width + y.shape[-1]
    if not fusion.has_shape(weight, (1, both)) and not fusion.has_shape(weight, (width, both)):
        raise checks.value_error(name, "weight", f"shape {(width, both)} or {(1, both)}", tuple(weight.shape))
    if bias is not None:
        fusion.check_shaped(name, "bias", bias, weight.shape[:1], x, "x")
    return gated_concat_op(x, y, weight, bias)[0]
