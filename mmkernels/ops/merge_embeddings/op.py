"""Registration of merge_embeddings and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmkernels._cuda import misaligned
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, NativeKernels, TritonKernels
from mmkernels.ops.merge_embeddings import reference


def _merge_embeddings_fake(text: Tensor, *_: Any) -> tuple[Tensor]:
    return (text.new_empty(text.shape),)


def _cuda_supports(text: Tensor, modals: Sequence[Tensor], mask: Tensor, check: bool) -> str | None:
    if text.shape[2] % 8:
        return f"{text.shape[2]} features: its kernel takes multiples of 8"
    if len(modals) > 64:
        return f"{len(modals)} modals, more than 64"
    if max(mask.numel(), sum(m.shape[0] for m in modals)) > 2**24:
        return "more than 2^24 tokens or rows: every block of its kernel would read too many counts"
    return misaligned(text, *modals)


merge_embeddings_op = DifferentiableOp(
    "merge_embeddings",
    "Tensor text, Tensor[] modals, Tensor mask, bool check",
    outputs="Tensor out",
    reference=reference.merge_embeddings,
    fake=_merge_embeddings_fake,
    cpu=NativeKernels("merge_embeddings"),
    cuda=CudaKernels(_cuda_supports),
    triton=TritonKernels(),
    keeps=Kept({"text": "mask", "modals": "mask"}),
)
