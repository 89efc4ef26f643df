"""A linear layer over the outer product of several modalities, without the outer product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops._rows import as_rows, from_rows
from mmkernels.ops.tensor_fusion_linear.op import tensor_fusion_linear_op

__all__ = ["tensor_fusion_linear"]


def tensor_fusion_linear(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, presence: Tensor | None = None
) -> Tensor:
    """Tensor fusion and the linear layer that follows it; the outer product is never stored, forward or backward.

        y = W · vec([1; x₁] ⊗ … ⊗ [1; x_M]) + b

    The ones keep every product of fewer modalities, down to each alone and a constant. Tensor fusion is Zadeh et al.,
    "Tensor Fusion Network for Multimodal Sentiment Analysis", 2017 (arXiv:1707.07250).

    Args:
        xs: M ≥ 1 tensors (*, D_i) with the same leading shape, float32, bfloat16, float16, or float64 (reference
            backend alone). Any widths, 0 included. Any strides; a last dim that is not contiguous costs a copy of that
            tensor.
        weight: (N, Π(D_i + 1)). A column's index has the first modality's index slowest; index 0 of a modality is its
            1, index j its feature j − 1.
        bias: (N,).
        presence: (*, M) or (M,) bool, True where a modality was observed. An absent one counts as zeros, whatever it
            holds, and its gradient is zero; its appended 1 stays.

    All floating tensors have one dtype and device. Under autocast they are cast to its dtype.

    Returns:
        (*, N).

    Example:
        >>> text, audio, video = torch.randn(8, 32), torch.randn(8, 16), torch.randn(8, 8)
        >>> tensor_fusion_linear([text, audio, video], torch.randn(64, 33 * 17 * 9)).shape
        torch.Size([8, 64])
    """
    if may_use_door():
        plain = tensor_fusion_linear_op.unchecked(xs, weight, bias, presence)
        if plain is not None:
            return plain
    if is_overridden(xs, weight, bias, presence):
        return overridden_call(tensor_fusion_linear, locals())
    name = "tensor_fusion_linear"
    first = fusion.first_source(name, xs)
    if checks.autocast_is_on(first.device):
        xs, weight, bias = fusion.autocast(first.device, xs, weight, bias)
        first = xs[0]
    lead, _ = fusion.check_sources(name, xs)
    features = 1
    for x in xs:
        features = features * (x.shape[-1] + 1)
    outputs = fusion.check_weight(name, "weight", weight, features, first)
    if bias is not None:
        fusion.check_shaped(name, "bias", bias, (outputs,), first)
    if presence is not None:
        presence = fusion.row_presence(name, presence, lead, len(xs), first)
    return from_rows(tensor_fusion_linear_op([as_rows(x) for x in xs], weight, bias, presence)[0], lead)
