"""Modules of `mmkernels.nn` whose weights are spread over ranks: styles for torch's ``parallelize_module``.

A style makes DTensors of a module's parameters and of the tensors that it is called with; its ops then compute as
`sharding_rules` has it. Projections into heads or hidden features are sharded over what they give, those out of them
over what they sum over, so that one sum over the ranks ends a branch. Projections that hold several in one weight have
heads apart in memory, and every rank has all of them.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils._pytree import tree_map_only

import mmkernels.nn as modules
from mmkernels.ops import _checks as checks

_COLUMNS = {"weight": 0, "bias": 0}
# For each module the dims of its parameters that are sharded, by pattern; those of heads where ranks divide these.
_FUSIONS: dict[type[nn.Module], dict[str, int]] = {
    modules.ConcatFusion: _COLUMNS,
    modules.TensorFusion: _COLUMNS,
    modules.LowRankFusion: {"factors.*": 2, "bias": 0},
    modules.GatedCrossAttentionBlock: {"feedforward_in.*": 0, "feedforward_out.weight": 1},
}
_HEADS: dict[type[nn.Module], dict[str, int]] = {
    modules.MultiheadCrossAttention: {"[qkv]_proj_weight": 0, "out_proj.weight": 1},
    modules.GatedCrossAttentionBlock: {"query_proj.*": 0, "out_proj.weight": 1},
    modules.DeformableAttention: {
        "sampling_offsets.*": 0,
        "attention_weights.*": 0,
        "value_proj.*": 0,
        "output_proj.weight": 1,
    },
    modules.JointAttention: {"out_proj.*.weight": 1},
    modules.BidirectionalCrossAttention: {"[xy]_out_proj.weight": 1},
}


class ModuleParallel(ParallelStyle):
    """How ``torch.distributed.tensor.parallel.parallelize_module`` spreads a module of `mmkernels.nn`.

    The module takes plain tensors, which every rank has alike, or DTensors, and gives plain ones that every rank has.
    Its state dict keeps its names; parameters are DTensors, for optimizers and ``torch.distributed.checkpoint`` as
    usual. Parameters that are not sharded are copies.

    Args:
        rows: of a ConcatFusion: the weight is sharded over its columns, as fits sources that are sharded over their
            features; else over its rows.

    Raises:
        TypeError: a module of another kind, or ``rows`` for one that is no ConcatFusion.

    Example:
        >>> mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))  # of one process; each has its share
        >>> model = parallelize_module(model, mesh, {"read": ModuleParallel(), "fuse": ModuleParallel()})
    """

    def __init__(self, *, rows: bool = False) -> None:
        super().__init__()
        self.rows = rows

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = next((k for name in modules.__all__ if isinstance(module, k := getattr(modules, name))), None)
        if kind is None:
            raise checks.type_error("ModuleParallel", "module", "one of mmkernels.nn", type(module).__name__)
        if self.rows and kind is not modules.ConcatFusion:
            raise checks.type_error("ModuleParallel", "rows", "False but for a ConcatFusion", type(module).__name__)
        dims = {"weight": 1} if self.rows else dict(_FUSIONS.get(kind, {}))
        heads = [getattr(module, name) for name in ("num_heads", "num_kv_heads") if hasattr(module, name)]
        if all(count % device_mesh.size() == 0 for count in heads):
            dims |= _HEADS.get(kind, {})

        def partition(prefix: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                full = f"{prefix}.{name}" if prefix else name
                dim = next((d for pattern, d in dims.items() if fnmatch(full, pattern)), None)
                if dim is not None:
                    spread = distribute_tensor(parameter, mesh, [Shard(dim)], src_data_rank=self.src_data_rank)
                    part.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))

        module = distribute_module(module, device_mesh, partition)

        def spread(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return tree_map_only(Tensor, lambda x: _spread(x, device_mesh), (args, kwargs))

        def gathered(_: nn.Module, args: Any, result: Any) -> Any:
            return tree_map_only(DTensor, lambda x: x.redistribute(placements=[Replicate()]).to_local(), result)

        module.register_forward_pre_hook(spread, with_kwargs=True)
        module.register_forward_hook(gathered)
        return module


def _spread(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for ``parallelize_module``: every module of `mmkernels.nn` in a model, and none inside another.

    Example:
        >>> model = parallelize_module(model, mesh, parallel_plan(model))
    """
    kinds = tuple(getattr(modules, name) for name in modules.__all__)
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in plan)
        if isinstance(module, kinds) and not inside:
            plan[name] = ModuleParallel()
    return plan
