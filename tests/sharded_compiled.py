"""One rank of calls of every op, and of a spread module, on DTensors under torch.compile."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from calls import FIRST, Call
from processes import take_part
from sharded_ops import SHAPES, of_tensors, results, spread, worst
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import mmkernels as mmk
from mmkernels.distributed import parallel_plan

BROKEN = ("contrastive_loss", "sigmoid_contrastive_loss")  # whose calls are between graphs


def error(call: Call, mesh: DeviceMesh) -> float:
    torch._dynamo.reset()
    inputs = call.inputs(torch.float64)
    plain = of_tensors(inputs, lambda x: x.detach().requires_grad_(x.is_floating_point()))
    compiled = torch.compile(call.public, backend="aot_eager", fullgraph=call.op not in BROKEN)
    expected = results(call.public, plain)
    got = results(compiled, spread(inputs, mesh, random.Random(call.op)))
    return max(worst(got[0], expected[0]), worst(got[1], expected[1]))


def error_of_module(mesh: DeviceMesh) -> float:
    torch._dynamo.reset()
    torch.manual_seed(2)
    plain = nn.Sequential(mmk.nn.ConcatFusion([4, 6], 8, activation="gelu"), nn.Linear(8, 3)).double()
    sources = [torch.randn(5, n, dtype=torch.float64) for n in (4, 6)]
    net = copy.deepcopy(plain)
    parallelize_module(net, mesh, parallel_plan(net))
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for model, called in ((plain, plain), (net, compiled)):
        out = called(sources)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    return worst(found[1], found[0])


def work(rank: int, ranks: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", SHAPES[ranks])
    found = {}
    for name, call in FIRST.items():
        try:
            found[name] = error(call, mesh)
        except Exception as failure:
            raise RuntimeError(f"in {name}") from failure
    return {**found, "module": error_of_module(mesh)}


if __name__ == "__main__":
    take_part(work)
