"""merge_embeddings: embeddings of other modalities in the places that a token sequence keeps for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels._dispatch import may_use_door
from mmkernels._overrides import is_overridden, overridden_call
from mmkernels.ops import _checks as checks
from mmkernels.ops.merge_embeddings.op import merge_embeddings_op

_NAME = "merge_embeddings"


def merge_embeddings(
    text: Tensor, modal: Tensor | Sequence[Tensor], mask: Tensor, *, check: bool | None = None
) -> Tensor:
    """A copy of ``text`` whose t-th True position of ``mask``, in row-major order, holds row t of ``modal``.

    How vision-language models such as `LLaVA <https://arxiv.org/abs/2304.08485>`_ put image features in the places of
    image tokens; equal, bit for bit, to ``text.masked_scatter(mask.unsqueeze(-1), modal)``.

    Args:
        text: (B, L, C), any dtype. float32, bfloat16 and float16 run on kernels. Any strides.
        modal: (T, C), of text's dtype and device, or a list of such, consumed in order.
        mask: (B, L) bool, True in ΣT places.
        check: raise if the mask has not exactly ΣT True positions. None: on the CPU. On a GPU, where nothing waits for
            the count, it is an assertion on the device, and without it rows beyond the count are not used, nor are they
            with check=False on the CPU, where too few rows raise all the same.

    Returns:
        (B, L, C), contiguous. The gradient of text is zero at True positions.

    Under autocast, tensors of different dtypes are promoted to the widest, as ``torch.cat`` does.

    Raises:
        ValueError: shapes that do not fit, or a count that does not.

    Example:
        >>> text, image = torch.zeros(1, 4, 2), torch.ones(2, 2)
        >>> merge_embeddings(text, image, torch.tensor([[False, True, True, False]]))[0, :, 0]
        tensor([0., 1., 1., 0.])
    """
    if may_use_door():
        out = merge_embeddings_op.unchecked(
            text, modal if type(modal) is list else [modal], mask, True if check is None else check
        )
        if out is not None:
            return out
    if is_overridden(text, modal, mask):
        return overridden_call(merge_embeddings, locals())
    modals: list[Tensor] = list(modal) if isinstance(modal, (list, tuple)) else [modal]  # type: ignore[list-item]
    names = [f"modal[{i}]" for i in range(len(modals))] if isinstance(modal, (list, tuple)) else ["modal"]
    checks.check_tensor(_NAME, "text", text)
    checks.check_tensor(_NAME, "mask", mask)
    if len(modals) == 0:
        raise checks.value_error(_NAME, "modal", "a tensor or at least one in a list", "none")
    for argument, tensor in zip(names, modals, strict=True):
        checks.check_tensor(_NAME, argument, tensor)
    if text.dim() != 3:
        raise checks.value_error(_NAME, "text", "3 dims (B, L, C)", f"shape {tuple(text.shape)}")
    if checks.autocast_is_on(text.device):
        text, *modals = checks.autocast_promoted(text, *modals)
    for argument, tensor in zip(names, modals, strict=True):
        checks.check_same_kind(_NAME, text, "text", **{argument: tensor})
        if tensor.dim() != 2 or tensor.shape[1] != text.shape[2]:
            raise checks.value_error(_NAME, argument, f"shape (T, {text.shape[2]})", tuple(tensor.shape))
    if mask.dtype != torch.bool:
        raise checks.type_error(_NAME, "mask", "dtype bool", mask.dtype)
    checks.check_same_device(_NAME, "mask", mask, "text", text.device)
    if mask.shape != text.shape[:2]:
        raise checks.value_error(_NAME, "mask", f"shape {tuple(text.shape[:2])}", tuple(mask.shape))
    if check is None:
        check = text.device.type == "cpu"
    elif not isinstance(check, bool):
        raise checks.type_error(_NAME, "check", "a bool or None", type(check).__name__)
    (out,) = merge_embeddings_op(text, modals, mask, check)
    return out
