"""Registration of merge_embeddings and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._cuda import misaligned
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import CudaKernels, TritonKernels
from mmkernels.ops.merge_embeddings import reference


class Arguments(NamedTuple):
    text: Tensor
    modals: Sequence[Tensor]
    mask: Tensor
    check: bool


def _merge_embeddings_fake(a: Arguments) -> tuple[Tensor]:
    text = a.text
    return (text.new_empty(text.shape),)


def _cuda_supports(a: Arguments) -> str | None:
    text, modals, mask, _ = a
    if text.shape[2] % 8:
        return f"{text.shape[2]} features: its kernel takes multiples of 8"
    if len(modals) > 64:
        return f"{len(modals)} modals, more than 64"
    if max(mask.numel(), sum(m.shape[0] for m in modals)) > 2**24:
        return "more than 2^24 tokens or rows: every block of its kernel would read too many counts"
    return misaligned(text, *modals)


merge_embeddings_op = DifferentiableOp(
    "merge_embeddings",
    Arguments,
    outputs="Tensor out",
    reference=reference.merge_embeddings,
    fake=_merge_embeddings_fake,
    cuda=CudaKernels(_cuda_supports),
    triton=TritonKernels(),
    keeps=Kept({"text": "mask", "modals": "mask"}),
)
