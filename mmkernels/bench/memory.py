"""Bytes that one call takes: at its peak, and what autograd keeps from forward to backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes that the call has from torch's allocator at one time, beyond what was there before.

    On the CPU the scratch that a library allocates for itself is not seen.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before, 0)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    results = record.profiler.kineto_results if record.profiler is not None else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def kept(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """The bytes of what autograd saves in the forward, the tensors that the call was given left out."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(saved.values())
