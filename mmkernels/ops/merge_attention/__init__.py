"""The attention over a union of key sets from the attention over each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops import _fusion_checks as fusion
from mmkernels.ops.merge_attention.op import merge_attention_op

__all__ = ["merge_attention"]


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of several sets of keys, exactly, from output and LSE over each of them.

        lse = log Σ_i exp lse_i,  out = Σ_i exp(lse_i − lse) · out_i

    The step that lets attention run over parts of the keys, by tile, by device or by source: Milakov and Gimelshein,
    "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).

    Args:
        outputs: M tensors (*, L, D) of one shape, float32, bfloat16, float16, or float64 (reference backend alone).
        lses: M tensors (*, L), natural log, float32 (float64 for float64 outputs), as `cross_attention` returns them.

    Returns:
        out (*, L, D), in the memory order of the first output, and lse (*, L). Both are differentiable in every input.

    A part whose lse is −inf counts for nothing, whatever its output holds; where all are, out is 0, lse −inf and every
    gradient 0.

    Example:
        >>> query, text, image = torch.randn(2, 8, 64, 32), torch.randn(2, 8, 77, 32), torch.randn(2, 8, 576, 32)
        >>> parts = [cross_attention(query, x, x, return_lse=True) for x in (text, image)]
        >>> out, lse = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 64, 32]), torch.Size([2, 8, 64]))
    """
    if may_use_door():
        plain = merge_attention_op.unchecked(outputs, lses)
        if plain is not None:
            return plain[0], plain[1]
    if is_overridden(outputs, lses):
        return overridden_call(merge_attention, locals())
    name = "merge_attention"
    first = fusion.first_source(name, outputs, "outputs")
    fusion.first_source(name, lses, "lses")
    if first.dtype not in checks.FLOATING:
        raise checks.type_error(name, "outputs[0]", "dtype float32, bfloat16, float16 or float64", first.dtype)
    if first.dim() < 2:
        raise checks.value_error(name, "outputs[0]", "at least 2 dims (*, L, D)", f"shape {tuple(first.shape)}")
    if len(lses) != len(outputs):
        raise checks.value_error(name, "lses", f"{len(outputs)} tensors as in outputs", len(lses))
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        fusion.check_shaped(name, f"outputs[{i}]", output, first.shape, first, "outputs[0]")
        checks.check_tensor(name, f"lses[{i}]", lse)
        if lse.dtype != wide:
            raise checks.type_error(name, f"lses[{i}]", f"dtype {wide}", lse.dtype)
        checks.check_same_device(name, f"lses[{i}]", lse, "outputs[0]", first.device)
        if lse.shape != first.shape[:-1]:
            raise checks.value_error(name, f"lses[{i}]", f"shape {tuple(first.shape[:-1])}", tuple(lse.shape))
    out, lse = merge_attention_op(list(outputs), list(lses))
    return out, lse
