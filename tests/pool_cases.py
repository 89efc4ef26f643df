"""The attention pools as one table: their parameters, and calls on leaves, for the tests that all three share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmkernels as mmk

Sources = list[Tensor] | Tensor


@dataclass(frozen=True)
class Sizes:
    batch: int = 9
    modalities: int = 3
    width: int = 13
    hidden: int = 7
    query: int = 5


def _random(*shape: int, dtype: torch.dtype, gain: float = 1.0) -> Tensor:
    return (torch.randn(shape) * gain).to(dtype).requires_grad_()


def sources(s: Sizes, dtype: torch.dtype = torch.float32, stacked: bool = False) -> Sources:
    if stacked:
        return _random(s.batch, s.modalities, s.width, dtype=dtype)
    return [_random(s.batch, s.width, dtype=dtype) for _ in range(s.modalities)]


def _gain(width: int) -> float:
    return max(width, 1) ** -0.5


def additive(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "weight": _random(s.hidden, s.width, dtype=dtype, gain=_gain(s.width)),
        "vector": _random(s.hidden, dtype=dtype),
    }


def additive_with_query(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return additive(s, dtype) | {
        "bias": _random(s.hidden, dtype=dtype),
        "query": _random(s.batch, s.query, dtype=dtype),
        "query_weight": _random(s.hidden, s.query, dtype=dtype, gain=_gain(s.query)),
    }


def dot_product(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {"query": _random(s.batch, s.width, dtype=dtype)}


def bilinear(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "query": _random(s.batch, s.query, dtype=dtype),
        "weight": _random(s.query, s.width, dtype=dtype, gain=_gain(s.query)),
        "scale": 0.7,
    }


def split(activation: str) -> Callable[[Sizes, torch.dtype], dict[str, Any]]:
    def parameters(s: Sizes, dtype: torch.dtype) -> dict[str, Any]:
        energies = s.modalities * s.width
        return {
            "weight1": _random(s.hidden, s.width, dtype=dtype, gain=_gain(s.width)),
            "bias1": _random(s.hidden, dtype=dtype),
            "weight2": _random(energies, s.hidden, dtype=dtype, gain=_gain(s.hidden)),
            "bias2": _random(energies, dtype=dtype),
            "activation": activation,
        }

    return parameters


# Each way to call a pool: its function, and its parameters by name.
POOLS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[Sizes, torch.dtype], dict[str, Any]]]] = {
    "additive": (mmk.additive_attention_pool, additive),
    "additive with query": (mmk.additive_attention_pool, additive_with_query),
    "dot product": (mmk.multiplicative_attention_pool, dot_product),
    "bilinear": (mmk.multiplicative_attention_pool, bilinear),
    "split relu": (mmk.split_attention_pool, split("relu")),
    "split gelu": (mmk.split_attention_pool, split("gelu")),
}


@dataclass(frozen=True)
class Call:
    """A pool as a function of leaves alone, its outputs side by side: [B, D + M or D + M·D]."""

    function: Callable[..., tuple[Tensor, Tensor]]
    count: int  # of the leaves that are xs; 0: the first is all of them, stacked
    names: Sequence[str]  # of the others
    options: dict[str, Any]

    def __call__(self, *leaves: Tensor) -> Tensor:
        xs = list(leaves[: self.count]) if self.count else leaves[0]
        parameters = dict(zip(self.names, leaves[max(self.count, 1) :], strict=True))
        pooled, weights = self.function(xs, **parameters, **self.options)
        return torch.cat([pooled, weights.flatten(1)], 1)


def call(
    pool: str,
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    stacked: bool = False,
    presence: Tensor | None = None,
) -> tuple[Call, list[Tensor]]:
    function, make = POOLS[pool]
    xs, parameters = sources(sizes, dtype, stacked), make(sizes, dtype)
    tensors = {k: v for k, v in parameters.items() if isinstance(v, Tensor)}
    options = {k: v for k, v in parameters.items() if k not in tensors} | {"presence": presence}
    leaves = [xs] if isinstance(xs, Tensor) else xs
    return Call(function, 0 if stacked else len(leaves), list(tensors), options), [*leaves, *tensors.values()]
