"""Registration of merge_embeddings and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp, TritonKernels, native_backend
from mmkernels.ops.merge_embeddings import reference


def _merge_embeddings_fake(text: Tensor, *_: Any) -> tuple[Tensor]:
    return (text.new_empty(text.shape),)


merge_embeddings_op = DifferentiableOp(
    "merge_embeddings",
    "Tensor text, Tensor[] modals, Tensor mask, bool check",
    outputs="Tensor out",
    reference=reference.merge_embeddings,
    fake=_merge_embeddings_fake,
    cpu=native_backend("merge_embeddings"),
    triton=TritonKernels(),
)
