"""What the engine measures: a case is a row of a table, dtype apart, and a problem what competes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One case's inputs and the functions that compete on them. Each function takes the leaves and nothing else; masks,
    lengths and flags are bound in. Leaves are the floating inputs, and a training pass takes the gradient of every one.
    """

    leaves: tuple[Tensor, ...]
    names: tuple[str, ...]
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    # The formula in plain PyTorch: in float64 it is the oracle of the check, under torch.compile a contender.
    eager: Callable[..., Tensor]
    # What else there is for the same result, by name; where one cannot serve the case its column has a gap.
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # As others, but the first call compiles for seconds, which is paid from the budget's share for that.
    compiling: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # A provider, called with the workload and the arguments that plain torch takes, as a function of the leaves.
    provided: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None
    fixed: tuple[Tensor, ...] = ()  # what is bound in: masks, lengths, labels


@dataclass(frozen=True)
class Case:
    """One row of the table, dtype apart."""

    group: str  # "forward", "training", ...: geometric means are taken over a group
    shape: str  # as it reads in the table
    note: str  # what has such a shape
    problem: Callable[[torch.dtype], Problem]
    flops: float
    bytes: Callable[[int], float]  # of the item size: the least traffic, each input read and each output written once
    training: bool = False  # forward and backward, otherwise forward under no_grad
    quick: bool = False  # part of a --quick run
    gpu: bool = False  # too large for a CPU's run
    length: float = 0.0  # what time is plotted against; 0 where there is none
    series: str = ""  # rows that differ in length alone share it
