"""Public functions of DTensors: `sharding_rules` says along which dims, the local tensors are what is computed with.

For each dim of the mesh the sharding is taken that moves the fewest bytes; arguments that do not lie so are
redistributed. The call then is the plain one, on this rank's tensors, with the kernels and gradients that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmkernels.distributed.partial_sums import SUMS, Place, concat_linear_of_normalised
from mmkernels.distributed.sharding_rules import FEATURES, RULES, Dims, Rule
from mmkernels.ops import _checks as checks


def sharded_call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """The result, in DTensors, of the call that has these arguments by name; all tensors among them are DTensors."""
    op = function.__name__
    rule = RULES[op].for_call(given)
    if given.get("dropout_p", 0.0) != 0.0:
        raise checks.value_error(op, "dropout_p", "0 for DTensors, whose ranks draw apart", given["dropout_p"])
    if given.get("group") is not None:
        raise checks.value_error(op, "group", "None for DTensors, which have a mesh", "a group")
    arguments = [_Argument(op, name, value, rule) for name, value in given.items()]
    found = [x for argument in arguments for x in argument.tensors]
    mesh = found[0][0].device_mesh
    for argument in arguments:
        for tensor, _ in argument.tensors:
            if tensor.device_mesh != mesh:
                raise checks.value_error(op, argument.name, f"the mesh {mesh}, as of the others", tensor.device_mesh)
    sizes: dict[str, int] = {}
    for tensor, dims in found:
        for dim, size in zip(dims, tensor.shape, strict=False):
            sizes[dim] = size if sizes.get(dim, 1) == 1 else sizes[dim]
    chosen = _chosen(rule, given, found, sizes, mesh)
    over = [i for i, dim in enumerate(chosen) if dim is not None and dim in _summed(rule, sizes)]
    if over and op not in SUMS:
        return concat_linear_of_normalised(given)
    local = {argument.name: argument.local(chosen, sizes, bool(rule.group)) for argument in arguments}
    if over:
        return _summed_up(op, local, given, chosen, over, sizes, mesh)
    if rule.group and any(chosen):
        local["group"] = mesh.get_group(next(i for i, dim in enumerate(chosen) if dim))
        chosen = [None] * mesh.ndim  # the loss is that of all ranks
    return _spread(function(**local), rule.outputs, chosen, sizes, mesh)


def _summed(rule: Rule, sizes: Mapping[str, int]) -> list[str]:
    return [dim for name in rule.summed.split() for dim in _expanded(name, sizes)]


def _summed_up(
    op: str,
    local: Mapping[str, Any],
    given: Mapping[str, Any],
    chosen: Sequence[str | None],
    over: Sequence[int],
    sizes: Mapping[str, int],
    mesh: Any,
) -> Any:
    """The result of an op whose terms the ranks hold; ``over``: the dims of the mesh to sum over."""
    sums = SUMS[op]
    places = [Place(str(chosen[i]), mesh.get_local_rank(i), mesh.size(i)) for i in over]
    terms = sums.of_shard(local, given, places)
    free = [None if i in over else dim for i, dim in enumerate(chosen)]
    return sums.whole(given, _spread(terms, sums.outputs, free, sizes, mesh, over))


class _Argument:
    """An argument's DTensors, each with the names of its dims, and how they become local."""

    def __init__(self, op: str, name: str, value: Any, rule: Rule) -> None:
        self.name = name
        self.values, self.tree = tree_flatten(value)
        self.tensors: list[tuple[DTensor, list[str]]] = []
        for x in self.values:
            if isinstance(x, DTensor):
                self.tensors.append((x, _named(rule.inputs.get(name, ""), x.dim())))
            elif isinstance(x, Tensor) and name != "spatial_shapes":
                raise checks.type_error(op, name, "a DTensor, as others are", type(x).__name__)

    def local(self, chosen: Sequence[str | None], sizes: Mapping[str, int], is_whole: bool) -> Any:
        """``is_whole``: whether each rank comes to the whole gradient of what it has a copy of."""
        dims = iter(self.tensors)
        return tree_unflatten(
            [_local(*next(dims), chosen, sizes, is_whole) if isinstance(x, DTensor) else x for x in self.values],
            self.tree,
        )


def _named(dims: Dims, count: int) -> list[str]:
    """The names of a tensor's dims; those that nothing is said of have none."""
    names = (dims.get(count, "") if isinstance(dims, dict) else dims).split()
    if "*" in names:
        after = len(names) - 1
        if count < after:  # one entry for all rows
            return names[len(names) - count :]
        return [f"*{i}" for i in range(count - after)] + names[1:]
    return names if len(names) == count else [""] * count


def _wanted(tensor: DTensor, dims: Sequence[str], dim: str | None, sizes: Mapping[str, int]) -> Placement:
    """Of a tensor where ``dim`` is sharded."""
    if dim is None:
        return Replicate()
    if dim in FEATURES and dim in dims:  # of another number in each source
        return Shard(dims.index(dim))
    for name in (dim, "g") if dim == "h" else (dim,):  # key heads follow those of queries
        if name in dims and tensor.shape[dims.index(name)] == sizes[name]:
            return Shard(dims.index(name))
    return Replicate()


def _chosen(
    rule: Rule,
    given: Mapping[str, Any],
    found: Sequence[tuple[DTensor, list[str]]],
    sizes: Mapping[str, int],
    mesh: Any,
) -> list[str | None]:
    """For each dim of the mesh the dim that is sharded over it; None where all is replicated."""
    bound = rule.bound(given).split()
    names = f"{rule.free} {rule.group} {rule.summed}".split()
    free = [dim for name in names for dim in _expanded(name, sizes) if dim not in bound]
    chosen: list[str | None] = []
    for i in range(mesh.ndim):
        costs = {}
        for dim in (None, *free):
            if dim is None or _may_shard(rule, dim, sizes, chosen, mesh.shape, i):
                wanted = (_wanted(x, dims, dim, sizes) for x, dims in found)
                costs[dim] = sum(
                    _cost(x.placements[i], placement, x.numel())
                    for (x, _), placement in zip(found, wanted, strict=True)
                )
                if dim in FEATURES:  # the sums that are still to be taken
                    names = [other for name in str(rule.outputs[0]).split() for other in _expanded(name, sizes)]
                    costs[dim] += math.prod([sizes[name] for name in names])
        chosen.append(min(costs, key=costs.__getitem__))
    return chosen


def _expanded(name: str, sizes: Mapping[str, int]) -> Iterator[str]:
    return (dim for dim in sizes if dim and (dim == name or (name == "*" and dim.startswith("*"))))


def _may_shard(
    rule: Rule, dim: str, sizes: Mapping[str, int], chosen: Sequence[str | None], shape: Sequence[int], i: int
) -> bool:
    if dim == rule.group:
        return dim not in chosen
    if dim in FEATURES:
        return not any(other in FEATURES for other in chosen)
    parts = shape[i]
    for other, count in zip(chosen, shape, strict=False):
        parts *= count if other == dim else 1
    if sizes[dim] < parts:  # an empty part, or a dim that broadcasts
        return False
    return dim not in rule.even or (
        sizes[dim] % parts == 0 and sizes.get("g" if dim == "h" else dim, parts) % parts == 0
    )


def _cost(placement: Placement, wanted: Placement, elements: int) -> float:
    """About how many elements each rank receives."""
    if placement == wanted or (placement.is_replicate() and wanted.is_shard()):
        return 0
    if placement.is_partial():
        return elements if wanted.is_shard() else 2 * elements
    return elements if wanted.is_replicate() else elements / 2


def _local(
    tensor: DTensor, dims: Sequence[str], chosen: Sequence[str | None], sizes: Mapping[str, int], is_whole: bool
) -> Tensor:
    """The local tensor, whose gradient is this rank's part of a sum where the tensor is not sharded and others are."""
    placements = [_wanted(tensor, dims, dim, sizes) for dim in chosen]
    gradients = [
        Partial() if dim is not None and not p.is_shard() and not is_whole else p
        for p, dim in zip(placements, chosen, strict=True)
    ]
    return tensor.redistribute(placements=placements).to_local(grad_placements=gradients)


def _spread(
    result: Any,
    outputs: Sequence[Dims],
    chosen: Sequence[str | None],
    sizes: Mapping[str, int],
    mesh: Any,
    over: Sequence[int] = (),
) -> Any:
    """The result with its tensors as DTensors; ``over``: the dims of the mesh that they are still to be summed over."""

    def spread(x: Tensor, dims: Dims) -> DTensor:
        names = (dims if isinstance(dims, str) else dims[x.dim()]).split()
        leading = x.dim() - len(names) + 1
        names = [f"*{i}" for i in range(leading)] + names[1:] if names[:1] == ["*"] else names
        held = [dim if dim in names or dim != "h" else "g" for dim in chosen]  # key heads follow those of queries
        placements: list[Placement] = [Replicate() if dim is None else Shard(names.index(dim)) for dim in held]
        for i in over:
            placements[i] = Partial()
        shape = list(x.shape)
        for dim in {dim for dim in held if dim is not None}:
            at = names.index(dim)
            parts = 1
            for other, count in zip(held, mesh.shape, strict=True):
                parts *= count if other == dim else 1
            # Of a dim that holds more than the one of this name, as h·d, all parts are equal.
            exact = shape[at] * parts if sizes[dim] % parts == 0 else sizes[dim]
            shape[at] = exact
        return DTensor.from_local(
            x, mesh, placements, run_check=False, shape=torch.Size(shape), stride=_dense_strides(x, shape)
        )

    if isinstance(result, Tensor):
        return spread(result, outputs[0])
    if isinstance(result, list):
        return [spread(x, outputs[0]) for x in result]
    return tuple(
        [spread(x, dims) for x in part] if isinstance(part, list) else spread(part, dims)
        for part, dims in zip(result, outputs, strict=False)
    )


def _dense_strides(like: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of a dense tensor whose dims lie in memory in the order of another's."""
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape) - 1, -1, -1), key=like.stride):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)
