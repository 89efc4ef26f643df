"""One rank of calls of every op on DTensors: with all placed alike, and with any placement of each."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from calls import CALLS, Call, Inputs, flat, leaves_of
from processes import take_part
from test_overrides import MODULES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._pytree import tree_leaves, tree_map_only

import mmkernels as mmk
from mmkernels.distributed import ModuleParallel, parallel_plan

SHAPES = {2: (2,), 4: (2, 2)}
MIXTURES = {2: 4, 4: 1}


def placed(x: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """The whole tensor, which every rank has, placed; in sums that are still to be taken rank 0 has all of it."""
    if not any(p.is_partial() for p in placements):
        return distribute_tensor(x, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    holds = all(not p.is_partial() or coordinate[i] == 0 for i, p in enumerate(placements))
    plain = distribute_tensor(x, mesh, [Replicate() if p.is_partial() else p for p in placements]).to_local()
    plain = plain if holds else torch.zeros_like(plain)
    return DTensor.from_local(plain, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def any_placement(x: Tensor, mesh: DeviceMesh, draw: random.Random) -> list[Placement]:
    ways: list[Placement] = [Replicate(), *(Shard(i) for i in range(x.dim()))]
    if x.is_floating_point():
        ways.append(Partial())
    return [draw.choice(ways) for _ in range(mesh.ndim)]


def results(function: Any, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a weighted sum of them."""
    leaves = leaves_of(inputs)
    outs = list(flat(function(**inputs)))
    total: Any = 0
    for i, x in enumerate(outs):
        total = total + (x.masked_fill(x == -torch.inf, 0) ** 2).sum() * (i + 1.5)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return outs, [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]


def spread(inputs: Inputs, mesh: DeviceMesh, draw: random.Random | None) -> Inputs:
    """The inputs as DTensors: those of dim 0 on it, or, with ``draw``, anywhere."""

    def of(x: Tensor) -> Tensor:
        alike: list[Placement] = [Shard(0) if x.dim() else Replicate(), *[Replicate()] * (mesh.ndim - 1)]
        there = placed(x.detach(), mesh, any_placement(x, mesh, draw) if draw else alike)
        return there.requires_grad_(x.is_floating_point())

    return of_tensors(inputs, of)


def of_tensors(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed."""
    changed: Inputs = tree_map_only(Tensor, change, inputs)
    return changed


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, beside the largest of what is expected; inf where a shape is another one."""
    largest = 0.0
    for a, b in zip(got, expected, strict=True):
        whole = a.full_tensor() if isinstance(a, DTensor) else a
        if whole.shape != b.shape:
            return float("inf")
        whole, b = (x.masked_fill(x == -torch.inf, -7.0) for x in (whole, b))
        if b.numel():
            largest = max(largest, float((whole - b).detach().abs().max() / (b.detach().abs().max() + 1e-3)))
    return largest


def errors(call: Call, mesh: DeviceMesh) -> dict[str, float]:
    """Of each way to place the tensors."""
    inputs = call.inputs(torch.float64)
    plain = of_tensors(inputs, lambda x: x.detach().requires_grad_(x.is_floating_point()))
    expected = results(call.public, plain)
    found = {}
    for i in range(-1, MIXTURES[dist.get_world_size()]):
        draw = None if i < 0 else random.Random(f"{call} {i}")
        outs, gradients = results(call.public, spread(inputs, mesh, draw))
        found["alike" if i < 0 else f"mixture {i}"] = max(worst(outs, expected[0]), worst(gradients, expected[1]))
    return found


def kept_placements(mesh: DeviceMesh) -> dict[str, str]:
    """Where what is already placed well stays."""

    def over(dim: int, *shape: int) -> DTensor:
        return distribute_tensor(torch.randn(shape), mesh, [Shard(dim)])

    def whole(*shape: int) -> DTensor:
        return distribute_tensor(torch.randn(shape), mesh, [Replicate()])

    heads = mmk.cross_attention(over(1, 3, 4, 5, 8), over(1, 3, 2, 6, 8), over(1, 3, 2, 6, 8), enable_gqa=True)
    queries = mmk.cross_attention(over(2, 3, 4, 5, 8), whole(3, 4, 6, 8), whole(3, 4, 6, 8))
    batch = mmk.cross_attention(over(0, 3, 4, 5, 8), over(0, 3, 4, 6, 8), over(0, 3, 4, 6, 8), is_causal=True)
    columns = mmk.concat_linear([whole(3, 4), whole(3, 2)], over(0, 8, 6), over(0, 8), activation="gelu")
    rows = mmk.concat_linear([over(0, 3, 4), over(0, 3, 2)], whole(8, 6))
    local = mmk.contrastive_loss(over(0, 6, 4), over(0, 6, 4), 2.0)
    named = {"heads": heads, "queries": queries, "batch": batch, "columns": columns, "rows": rows, "loss": local}
    return {name: str(x.placements) for name, x in named.items()}


def summed(mesh: DeviceMesh) -> dict[str, tuple[float, str, list[str]]]:
    """Calls whose results are sums over the ranks: their error, where the result is, and what collectives they took."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    columns, copies, rows = Shard(1), Replicate(), Shard(0)
    xs, normed, weight = [r(3, 40), r(3, 1), r(3, 23)], [r(3, 41), r(3, 23)], r(5, 64)
    product = {"weight": (weight, copies), "bias": (r(5), copies), "residual": (r(3, 5), copies)}
    of_sources = {"xs": (xs, columns), **product}
    presence = {"presence": (torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1]]).bool(), copies)}
    norm = {"norm_weight": (r(64), copies), "norm_bias": (r(64), copies), "weight": (weight, copies)}
    logits, labels = [r(7, 4), r(7, 3)], torch.tensor([0, 2, -100, 1, 1, 0, 2])
    calls: dict[str, Any] = {
        "sources": (mmk.concat_linear, of_sources, {}),
        "sources, presence": (mmk.concat_linear, of_sources | presence, {}),
        "sources, epilogue": (mmk.concat_linear, {**of_sources, "gate": (r(5), copies)}, {"activation": "gelu"}),
        "weight": (mmk.concat_linear, {"xs": (xs, copies), **product, "weight": (weight, columns)}, {}),
        "source and weight": (mmk.concat_linear, {"xs": ([r(3, 64)], columns), "weight": (weight, columns)}, {}),
        "normed sources": (mmk.concat_norm_linear, {"xs": (normed, columns), **norm}, {"activation": "silu"}),
        "rms-normed sources": (mmk.concat_norm_linear, {"xs": (normed, columns), **norm}, {"norm": "rms"}),
        "losses": (
            mmk.multimodal_cross_entropy,
            {"logits": (logits, rows), "labels": (labels, rows), "log_vars": (r(2), copies)},
            {},
        ),
        "divergence": (
            mmk.distillation_loss,
            {"student": (r(7, 4), rows), "teacher": (r(7, 4), rows), "labels": (labels, rows)},
            {},
        ),
    }
    found = {}
    for name, (function, tensors, options) in calls.items():

        def plain(x: Tensor) -> Tensor:
            return x.clone().requires_grad_(x.is_floating_point())

        whole: Inputs = {k: tree_map_only(Tensor, plain, x) for k, (x, _) in tensors.items()}
        parts: Inputs = {
            k: tree_map_only(Tensor, lambda x, at=at: placed(x, mesh, [at]).requires_grad_(x.is_floating_point()), x)
            for k, (x, at) in tensors.items()
        }
        call = functools.partial(function, **options)
        outs, gradients = results(call, parts)
        expected = results(call, whole)
        with CommDebugMode() as traffic:
            call(**parts)
        kinds = sorted({str(kind).split(".")[-1] for kind, count in traffic.get_comm_counts().items() if count})
        error = max(worst(outs, expected[0]), worst(gradients, expected[1]))
        found[name] = (error, str(outs[0].placements), kinds)
    return found


def modules(mesh: DeviceMesh) -> dict[str, tuple[float, list[str]]]:
    """Of each module of mmkernels.nn, spread by its plan: the error beside the plain one, and what is sharded."""

    class Calls(nn.Module):
        def __init__(self, part: nn.Module, call: Callable[..., Any]) -> None:
            super().__init__()
            self.part, self.call = part, call

        def forward(self, *tensors: Tensor) -> Any:
            return self.call(self.part, *tensors)

    def run(model: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
        outs = [x for x in tree_leaves(model(*tensors)) if isinstance(x, Tensor)]
        leaves = [*tensors, *model.parameters()]
        gradients = torch.autograd.grad(sum((x**2).sum() for x in outs), leaves, allow_unused=True)
        return [*outs, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True))]

    heads, presence = MODULES["MultiheadCrossAttention"], torch.tensor([True, False])
    separate = functools.partial(mmk.nn.MultiheadCrossAttention, 8, 4, batch_first=True, kdim=7, vdim=6)
    separate_call = lambda m, a, b: m(a, b[..., :7], b[..., :6], need_weights=False)[0]  # noqa: E731
    cases = {
        **{name: (*case, ModuleParallel()) for name, case in MODULES.items()},
        "heads of weights of their own": (separate, separate_call, heads[2], ModuleParallel()),
        "rows": (*MODULES["ConcatFusion"], ModuleParallel(rows=True)),
        "presence": (
            MODULES["ConcatFusion"][0],
            lambda m, a, b: m([a, b], presence=presence),
            MODULES["ConcatFusion"][2],
            ModuleParallel(),
        ),
    }
    found = {}
    for name, (make, call, inputs, style) in cases.items():
        torch.manual_seed(3)
        plain = Calls(make().double(), call)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        tensors = [x.double().requires_grad_() for x in inputs()]
        spread_out = copy.deepcopy(plain)
        assert list(parallel_plan(spread_out)) == ["part"]
        parallelize_module(spread_out, mesh, {"part": style})
        assert list(spread_out.state_dict()) == list(plain.state_dict())
        error = worst(run(spread_out, tensors), run(plain, tensors))
        parts = spread_out.part.named_parameters()
        found[name] = (error, [k for k, x in parts if any(at.is_shard() for at in x.placements)])
    return found


def messages(mesh: DeviceMesh) -> list[str]:
    x = distribute_tensor(torch.randn(2, 2, 4, 8), mesh, [Shard(0)])
    found = []
    for call in (
        lambda: mmk.cross_attention(x, x, torch.randn(2, 2, 4, 8)),
        lambda: mmk.cross_attention(x, x, x, dropout_p=0.5),
        lambda: parallelize_module(nn.Linear(2, 2), mesh, ModuleParallel()),
        lambda: parallelize_module(mmk.nn.GatedFusion([2, 2], 2), mesh, ModuleParallel(rows=True)),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def work(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", SHAPES[ranks])
    found: dict[str, Any] = {"errors": {}, "modules": modules(init_device_mesh("cpu", (ranks,)))}
    for name, call in CALLS.items():
        try:
            found["errors"][name] = errors(call, mesh)
        except Exception as error:
            raise RuntimeError(f"in {name}") from error
    if ranks == 2:
        found |= {"kept": kept_placements(mesh), "summed": summed(mesh), "messages": messages(mesh)}
    return found


if __name__ == "__main__":
    take_part(work)
