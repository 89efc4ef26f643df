"""Ops of DTensors whose results are sums over what the ranks hold: products over features, means over rows.

``SUMS[op]`` has two functions. `of_shard` makes this rank's terms, from its tensors; the terms of all ranks add up to
what `whole` makes the op's result of, both in DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from mmkernels.ops.concat_linear import concat_linear
from mmkernels.ops.concat_linear.reference import activate
from mmkernels.ops.distillation_loss import distillation_loss
from mmkernels.ops.multimodal_cross_entropy import multimodal_cross_entropy
from mmkernels.ops.multimodal_cross_entropy.reference import combined, valid_rows

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a rank is on the dim of the mesh that a summed dim is sharded over."""

    dim: str
    rank: int
    ranks: int

    def span(self, size: int) -> tuple[int, int]:
        """Begin and end of this rank's shard of so many."""
        chunk = -(-size // self.ranks)
        return min(self.rank * chunk, size), min((self.rank + 1) * chunk, size)


@dataclass(frozen=True)
class Sums:
    """How an op is summed over shards.

    Args:
        of_shard: ``(local arguments, all arguments, places)`` -> this rank's terms.
        outputs: the names of the dims of each term.
        whole: ``(all arguments, sums)`` -> the op's result.
    """

    of_shard: Callable[[Arguments, Arguments, Sequence[Place]], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    whole: Callable[[Arguments, tuple[DTensor, ...]], Any]


def complete(x: Any) -> Any:
    """With its partial sums added up, on all ranks."""
    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def _product_of_shard(local: Arguments, given: Arguments, places: Sequence[Place]) -> tuple[Tensor, ...]:
    """The product over this rank's features: those of its shards of the sources, or of its columns of the weight."""
    (place,) = places
    xs, weight = list(local["xs"]), local["weight"]
    widths = [x.shape[-1] for x in given["xs"]]
    ends = list(accumulate(widths))
    if len(xs) > 1 and place.dim == "k":
        spans = [(end - width, *place.span(width)) for end, width in zip(ends, widths, strict=True)]
        weight = torch.cat([weight[:, first + begin : first + end] for first, begin, end in spans], 1)
    elif len(xs) > 1:
        begin, end = place.span(ends[-1])
        firsts = [last - width for last, width in zip(ends, widths, strict=True)]
        xs = [x[..., max(begin - f, 0) : max(end - f, 0)] for x, f in zip(xs, firsts, strict=True)]
    bias, residual = local["bias"], None if _has_epilogue(given) else local["residual"]
    if place.rank > 0:  # what is added once; the gradient is that of rank 0
        bias, residual = (
            None if x is None else x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0) for x in (bias, residual)
        )
    return (concat_linear(xs, weight, bias, presence=local["presence"], residual=residual),)


def _has_epilogue(given: Arguments) -> bool:
    return given["activation"] is not None or given["gate"] is not None


def _product(given: Arguments, sums: tuple[DTensor, ...]) -> Any:
    (z,) = sums
    if not _has_epilogue(given):
        return z
    y = activate(complete(z), given["activation"])
    if given["gate"] is not None:
        y = torch.tanh(complete(given["gate"])) * y
    return y if given["residual"] is None else complete(given["residual"]) + y


def concat_linear_of_normalised(given: Arguments) -> Any:
    """concat_norm_linear of sources that are sharded over their features: statistics of rows are added up."""
    xs = [complete(x) for x in given["xs"]]
    widths = [x.shape[-1] for x in xs]
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in xs]

    def mean(terms: Sequence[Tensor]) -> Any:
        return sum(complete(x.sum(-1, keepdim=True)) for x in terms) / sum(widths)

    if given["norm"] == "layer":
        centre = mean(wide)
        wide = [x - centre for x in wide]
    inverse = torch.rsqrt(mean([x.square() for x in wide]) + given["eps"])
    scales = complete(given["norm_weight"]).split(widths)
    normalised = [x * inverse * g for x, g in zip(wide, scales, strict=True)]
    if given["norm_bias"] is not None:
        shifts = complete(given["norm_bias"]).split(widths)
        normalised = [x + h for x, h in zip(normalised, shifts, strict=True)]
    normalised = [x.to(y.dtype) for x, y in zip(normalised, xs, strict=True)]
    return concat_linear(normalised, given["weight"], given["bias"], activation=given["activation"])


def _losses_of_shard(local: Arguments, given: Arguments, places: Sequence[Place]) -> tuple[Tensor, ...]:
    """Of each modality the sum over this rank's valid rows, and how many these are."""
    options = {name: value for name, value in local.items() if name not in ("weights", "log_vars")}
    _, means = multimodal_cross_entropy(**options)
    labels = local["labels"] if isinstance(local["labels"], (list, tuple)) else [local["labels"]] * len(means)
    presence, ignored = local["presence"], local["ignore_index"]
    counts = torch.stack([valid_rows(y, ignored, presence, i).sum() for i, y in enumerate(labels)])
    wide = means.to(torch.promote_types(means.dtype, torch.float32))
    return wide * counts, counts


def _losses(given: Arguments, sums: tuple[DTensor, ...]) -> Any:
    totals, counts = (complete(x) for x in sums)
    vectors = [None if given[name] is None else complete(given[name]) for name in ("weights", "log_vars")]
    means = totals / counts.clamp(min=1)
    total, means = combined(means.unbind(), counts.unbind(), *vectors)
    dtype = given["logits"][0].dtype
    return total.to(dtype), means.to(dtype)


def _divergence_of_shard(local: Arguments, given: Arguments, places: Sequence[Place]) -> tuple[Tensor, ...]:
    """The sum over this rank's rows that count, and how many these are."""
    mean = distillation_loss(**local)
    student, labels = local["student"], local["labels"]
    if labels is None:
        count = torch.tensor(student.shape[:-1].numel(), device=student.device)
    else:
        count = (labels != local["ignore_index"]).sum()
    return mean.to(torch.promote_types(mean.dtype, torch.float32)) * count, count


def _divergence(given: Arguments, sums: tuple[DTensor, ...]) -> Any:
    total, count = (complete(x) for x in sums)
    return (total / count.clamp(min=1)).to(given["student"].dtype)


SUMS = {
    "concat_linear": Sums(_product_of_shard, ("* n",), _product),
    "multimodal_cross_entropy": Sums(_losses_of_shard, ("m", "m"), _losses),
    "distillation_loss": Sums(_divergence_of_shard, ("", ""), _divergence),
}
