"""Norm and linear layer over several modalities at once, without their concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.concat_norm_linear.op import concat_norm_linear_op

__all__ = ["concat_norm_linear"]


def concat_norm_linear(
    xs: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Literal["layer", "rms"] = "layer",
    eps: float = 1e-5,
    activation: fusion.Activation | None = None,
) -> Tensor:
    """``act(linear(norm(cat(xs, -1))))`` without the concatenation in memory, forward or backward.

        c = [x₁; …; x_M],  n = (c − mean) / √(var + eps) ∘ g + h,  y = act(n Wᵀ + b)

    and for "rms" n = c / √(mean(c²) + eps) ∘ g + h. The norm runs over all K features of a row, not per modality. Its
    statistics are float32 and computed from differences, so that features with a large mean lose nothing.

    Layer norm is Ba et al., 2016 (arXiv:1607.06450); RMS norm is Zhang and Sennrich, 2019 (arXiv:1910.07467).

    Args:
        xs: M tensors (*, K_i) with the same leading shape, float32, bfloat16, float16, or float64 (reference backend
            alone). Any widths, 0 included. Any strides; a last dim that is not contiguous costs a copy of that tensor.
        norm_weight: g, (K,), K = ΣK_i.
        norm_bias: h, (K,), or None.
        weight: (N, K), as in ``nn.Linear``. On the CPU read where it lies, if its rows or its columns are dense
            (``W.t()``).
        bias: (N,).
        norm: "layer" or "rms".
        eps: ≥ 0, added to the variance or mean square.
        activation: None, "relu", "gelu", "gelu_tanh" (the tanh approximation), "silu", "tanh", "sigmoid" or
            "quick_gelu" (z σ(1.702 z), CLIP's).

    All tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, N).

    Example:
        >>> image, text = torch.randn(8, 768), torch.randn(8, 512)
        >>> g, h, weight = torch.ones(1280), torch.zeros(1280), torch.randn(256, 1280)
        >>> concat_norm_linear([image, text], g, h, weight, activation="gelu").shape
        torch.Size([8, 256])
    """
    if may_use_door():
        out = concat_norm_linear_op.unchecked(xs, norm_weight, norm_bias, weight, bias, norm, eps, activation)
        if out is not None:
            return out
    if is_overridden(xs, norm_weight, norm_bias, weight, bias):
        return overridden_call(concat_norm_linear, locals())
    name = "concat_norm_linear"
    first = fusion.first_source(name, xs)
    if checks.autocast_is_on(first.device):
        tensors = (xs, norm_weight, norm_bias, weight, bias)
        xs, norm_weight, norm_bias, weight, bias = fusion.autocast(first.device, *tensors)
        first = xs[0]
    _, width = fusion.check_sources(name, xs)
    fusion.check_shaped(name, "norm_weight", norm_weight, (width,), first)
    if norm_bias is not None:
        fusion.check_shaped(name, "norm_bias", norm_bias, (width,), first)
    features = fusion.check_weight(name, "weight", weight, width, first)
    if bias is not None:
        fusion.check_shaped(name, "bias", bias, (features,), first)
    if norm != "layer" and norm != "rms":
        raise checks.value_error(name, "norm", "'layer' or 'rms'", repr(norm))
    if type(eps) is not float:
        eps = checks.check_number(name, "eps", eps)
    if not eps >= 0:
        raise checks.value_error(name, "eps", "a number ≥ 0", eps)
    if activation is not None:
        fusion.check_activation(name, activation)
    return concat_norm_linear_op(list(xs), norm_weight, norm_bias, weight, bias, norm, eps, activation)[0]
