"""A linear layer over several modalities at once, without their concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.concat_linear.op import concat_linear_op

__all__ = ["concat_linear"]


def concat_linear(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: fusion.Activation | None = None,
    presence: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``act(linear(cat(xs, -1)))`` with gate and residual, and no concatenation in memory, forward or backward.

        z = [x₁; …; x_M] Wᵀ + b,  y = act(z),  y ← tanh(gate) · y,  y ← residual + y

    Early fusion is the oldest way to join modalities (Baltrušaitis et al., "Multimodal Machine Learning: A Survey and
    Taxonomy", 2017, arXiv:1705.09406); the tanh gate on a residual branch is Flamingo's (Alayrac et al., 2022,
    arXiv:2204.14198).

    Args:
        xs: M tensors (*, K_i) with the same leading shape, float32, bfloat16, float16, or float64 (reference backend
            alone). Any widths, 0 included. Any strides; a last dim that is not contiguous costs a copy of that tensor.
        weight: (N, K), K = ΣK_i, as in ``nn.Linear``. On the CPU read where it lies, if its rows or its columns are
            dense (``W.t()``).
        bias: (N,).
        activation: None, "relu", "gelu", "gelu_tanh" (the tanh approximation), "silu", "tanh", "sigmoid" or
            "quick_gelu" (z σ(1.702 z), CLIP's).
        presence: (*, M) or (M,) bool, True where a modality was observed. An absent one counts as zeros, whatever it
            holds, and its gradient is zero.
        residual: (*, N), added last.
        gate: scalar or (N,); its tanh multiplies the activation.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, N).

    Example:
        >>> text, audio, video = torch.randn(8, 300), torch.randn(8, 74), torch.randn(8, 35)
        >>> concat_linear([text, audio, video], torch.randn(128, 409), activation="relu").shape
        torch.Size([8, 128])
    """
    if may_use_door():
        out = concat_linear_op.unchecked(xs, weight, bias, activation, presence, residual, gate)
        if out is not None:
            return out
    if is_overridden(xs, weight, bias, presence, residual, gate):
        return overridden_call(concat_linear, locals())
    name = "concat_linear"
    first = fusion.first_source(name, xs)
    if checks.autocast_is_on(first.device):
        xs, weight, bias, residual, gate = fusion.autocast(first.device, xs, weight, bias, residual, gate)
        first = xs[0]
    lead, width = fusion.check_sources(name, xs)
    features = fusion.check_weight(name, "weight", weight, width, first)
    if bias is not None:
        fusion.check_shaped(name, "bias", bias, (features,), first)
    if activation is not None:
        fusion.check_activation(name, activation)
    if presence is not None:
        fusion.check_presence(name, presence, lead, len(xs), first)
    if residual is not None:
        fusion.check_shaped(name, "residual", residual, (*lead, features), first)
    if gate is not None:
        checks.check_tensor(name, "gate", gate)
        fusion.check_kind(name, "gate", gate, first)
        if gate.dim() > 0 and gate.shape != (features,):
            raise checks.value_error(name, "gate", f"a scalar or shape {(features,)}", tuple(gate.shape))
    return concat_linear_op(list(xs), weight, bias, activation, presence, residual, gate)[0]
