"""Registration of deformable_attention: schema, shapes of its output, backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mmkernels._arguments import SymInts
from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import NativeKernels, TritonKernels
from mmkernels.ops.deformable_attention import reference


class Arguments(NamedTuple):
    values: Sequence[Tensor]
    locations: Tensor
    weights: Tensor
    presence: Tensor | None
    shapes: SymInts
    levels: Sequence[int]
    points: Sequence[int]
    discrete: bool


def _deformable_attention_fake(a: Arguments) -> tuple[Tensor]:
    values, locations = a.values, a.locations
    batch, queries, heads = locations.shape[:3]
    return (values[0].new_empty((batch, queries, heads * values[0].shape[3])),)


def _rows_have_32_bits(a: Arguments) -> str | None:
    values = a.values
    return None if sum(v.shape[1] for v in values) < 2**31 else "maps of 2^31 pixels or more"


def _cells_have_32_bits(a: Arguments) -> str | None:
    """Cells between pixels are up to four times as many as these."""
    values = a.values
    return None if sum(v.shape[1] for v in values) < 2**29 else "maps of 2^29 pixels or more"


deformable_attention_op = DifferentiableOp(
    "deformable_attention",
    Arguments,
    outputs="Tensor out",
    reference=reference.deformable_attention,
    fake=_deformable_attention_fake,
    cpu=NativeKernels(_rows_have_32_bits),
    triton=TritonKernels(_cells_have_32_bits),
    keeps=Kept({"values": "locations weights presence", "weights": "values locations presence"}),
)
