"""The frame of an example: its options, training with both sets of ops, tables, pictures and checks that fail."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn

import mmkernels
from common import plain

EARLY, ROUNDING = 10, 2e-4  # steps before rounding has been amplified, and how far the losses may lie apart there


class Run:
    """A model that uses one set of ops, its optimiser, and what each step lost and took."""

    def __init__(self, make: Callable[[ModuleType], nn.Module], ops: ModuleType, lr: float) -> None:
        torch.manual_seed(0)
        self.model = make(ops)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr, eps=1e-5)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, *batch: object) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model.loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


class Example:
    """Options from the command line: --quick for few steps, --seconds for a bound, --picture for where that goes.

    `trainings` says how many calls of `train` share the seconds.
    """

    def __init__(self, doc: str, argv: list[str] | None, trainings: int = 1) -> None:
        parser = argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--quick", action="store_true", help="train for few steps, as the tests do")
        parser.add_argument("--seconds", type=float, default=math.inf, help="stop training when they are over")
        parser.add_argument("--picture", type=Path, help="where to save the picture, if there is one")
        options = parser.parse_args(argv)
        self.quick, self.path = options.quick, options.picture
        self.end, self.trainings = time.perf_counter() + options.seconds, trainings
        self.failures = 0
        self.seconds: dict[str, float] = {}  # of a step in the latest training, by set of ops
        torch.manual_seed(0)
        torch.set_num_threads(1)  # tensors this small gain nothing from a second

    def steps(self, count: int, quick: int | None = None) -> int:
        return (quick or count // 3) if self.quick else count

    def train(
        self,
        what: str,
        make: Callable[[ModuleType], nn.Module],
        batch: Callable[[int], tuple],
        steps: int,
        lr: float = 3e-3,
    ) -> nn.Module:
        """Train the model with mmkernels' ops and with plain torch's, from one seed on the same batches.

        The two take turns step by step, so that what else the machine does slows both; the first EARLY losses must
        agree, and with --quick torch's are no more than those. Where --seconds bounds the example, this training stops
        when its share of what is left is over, but not before EARLY steps. Returns mmkernels' model.
        """
        start = time.perf_counter()
        end = start + max(self.end - start, 0) / max(self.trainings, 1)
        self.trainings -= 1
        runs = {"mmkernels": Run(make, mmkernels, lr), "torch": Run(make, plain, lr)}
        for step in range(steps):
            if step >= EARLY and time.perf_counter() > end:
                print(f"{what}: stopped after {step} of {steps} steps, as --seconds asks")
                steps = step
                break
            inputs = batch(step)
            for run in runs.values() if step < EARLY or not self.quick else [runs["mmkernels"]]:
                torch.manual_seed(step)
                run.step(*inputs)
        ours, torchs = runs.values()
        pairs = zip(ours.losses[:EARLY], torchs.losses[:EARLY], strict=True)
        apart = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
        self.seconds = {name: median(run.seconds) for name, run in runs.items()}
        times = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self.seconds.items())
        print(f"{what}: {steps} steps, loss {ours.losses[0]:.3f} -> {ours.losses[-1]:.3f}; a step takes {times}")
        self.check(f"{what}: the same losses as plain torch (relative difference {apart:.0e})", apart < ROUNDING)
        return ours.model.eval()

    def time(self, what: str, call: Callable[[ModuleType], object], repeats: int = 20) -> None:
        """Print how long a call takes with either set of ops, and check that both return the same."""
        results, seconds = {}, {"mmkernels": [], "torch": []}
        for _ in range(repeats + 1):
            for name, ops in (("mmkernels", mmkernels), ("torch", plain)):
                start = time.perf_counter()
                results[name] = call(ops)
                seconds[name].append(time.perf_counter() - start)
        print(f"{what}: " + ", ".join(f"{name} {1e3 * median(taken[1:]):.3f} ms" for name, taken in seconds.items()))
        apart = max((a - b).abs().max().item() for a, b in zip(*map(tensors, results.values()), strict=True))
        self.check(f"{what}: the same result as plain torch (difference {apart:.0e})", apart < ROUNDING)

    def table(self, header: list[str], rows: list[list[object]]) -> None:
        cells = [[str(c) if not isinstance(c, float) else f"{c:.3f}" for c in row] for row in [header, *rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print()
        for row in cells:
            print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
        print()

    def check(self, claim: str, holds: bool) -> None:
        self.failures += not holds
        print(f"{'ok    ' if holds else 'FAILED'} {claim}")

    @contextmanager
    def picture(self, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3)) -> Iterator[object]:
        """matplotlib's axes to draw on; saved where --picture says, else not at all."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
        yield axes
        if self.path is not None:
            figure.savefig(self.path, dpi=80)
        pyplot.close(figure)

    def finish(self) -> int:
        return 1 if self.failures else 0


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@torch.no_grad()
def accuracy(logits: Tensor, label: Tensor) -> float:
    return (logits.argmax(-1) == label).float().mean().item()
