"""Registration of norm_rotary and its backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmkernels._differentiable import DifferentiableOp
from mmkernels._kept import Kept
from mmkernels._kernels import TritonKernels
from mmkernels.ops.cross_attention.op import empty_in_order_of
from mmkernels.ops.norm_rotary import reference


class Arguments(NamedTuple):
    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    query_weight: Tensor | None
    key_weight: Tensor | None
    eps: float
    interleaved: bool


def _norm_rotary_fake(a: Arguments) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(a.query, a.query.shape), empty_in_order_of(a.key, a.key.shape)


def _gradient(leaf: Tensor, name: str) -> Tensor:
    return empty_in_order_of(leaf, leaf.shape) if name in ("query", "key") else leaf.new_empty(leaf.shape)


def _triton_supports(a: Arguments) -> str | None:
    features = a.query.shape[-1]
    return None if features <= 4096 else f"{features} features are more than the 4096 that a program holds"


def _kept(query_norm: bool, key_norm: bool) -> Kept:
    """A rotation alone is linear: its gradient does not depend on what was rotated."""
    everything = "query key cos sin query_weight key_weight"
    return Kept(
        {
            "query": "query cos sin query_weight" if query_norm else "cos sin",
            "key": "key cos sin key_weight" if key_norm else "cos sin",
            "cos": everything,
            "sin": everything,
            "query_weight": "query cos sin query_weight",
            "key_weight": "key cos sin key_weight",
        }
    )


norm_rotary_op = DifferentiableOp(
    "norm_rotary",
    Arguments,
    outputs="Tensor query, Tensor key",
    reference=reference.norm_rotary,
    fake=_norm_rotary_fake,
    triton=TritonKernels(_triton_supports),
    gradient=_gradient,
    keeps=(
        tuple(_kept(bool(i & 1), bool(i & 2)) for i in range(4)),
        lambda a: (a.query_weight is not None) + 2 * (a.key_weight is not None),
    ),
)
