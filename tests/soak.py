"""``make soak``: random calls for an hour, by threads, forked workers and backwards that fail half way.

Every round draws an activity by its number and the seed alone, so that ``--seed S --first N --rounds 1`` repeats it. A
round that takes longer than ``--patience`` counts as hanging: the stacks of all threads are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from mmkernels import _native
from mmkernels.testing import assert_matches_reference, op_names, poisoned_memory, random_inputs, same_bits
from mmkernels.testing.inputs import Inputs, function_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Products of few rows are torch's on all threads there are, so that the last bits depend on their number.
TORCHS_PRODUCTS = frozenset({"contrastive_loss", "sigmoid_contrastive_loss"})
MOST_GROWTH = 24 << 20  # bytes, while the allocator's pools settle


def drawn_call(draw: random.Random, most: int = 48) -> tuple[Callable[..., Any], Inputs]:
    """A public op and random arguments, some of them larger than one thread's share, some not contiguous."""
    op = draw.choice(op_names())
    most = 300 if draw.random() < 0.1 else most
    return function_of(op), random_inputs(op, draw.getrandbits(32), dtype=draw.choice(DTYPES), most=most, layouts=True)


def results(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Outputs and gradients, for gradients of the outputs that depend on nothing."""
    given = pytree.tree_map_only(Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), inputs)
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(7)
    outs = [x for x in pytree.tree_leaves(function(**given)) if x.requires_grad]
    grads = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x.dtype) for x in outs]
    pulled = torch.autograd.grad(outs, leaves, grads, materialize_grads=True) if outs else ()
    return [*(x.detach() for x in outs), *pulled]


def alike(function: Callable[..., Any], got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """The same bits, also where another number of threads computed; the same numbers where those are torch's."""
    if function.__name__ not in TORCHS_PRODUCTS:
        return same_bits(got, expected)
    pairs = [(x.float(), y.float(), torch.finfo(y.dtype).eps) for x, y in zip(got, expected, strict=True)]
    return all(torch.allclose(x, y, rtol=8 * eps, atol=8 * eps * y.abs().max().item()) for x, y, eps in pairs)


# --- activities: what a round does -----------------------------------------------------------------------------------


def compare(draw: random.Random) -> None:
    """A call on any instruction set obeys the precision rule, and with any number of threads has the same bits."""
    function, inputs = drawn_call(draw)
    isas = _native.supported_isas()
    with _native.use_isa(draw.choice(isas)), poisoned_memory():
        assert_matches_reference(function, **inputs)
        torch.set_num_threads(1)
        alone = results(function, inputs)
        torch.set_num_threads(draw.choice((2, 3)))
        assert alike(function, results(function, inputs), alone), f"{function.__name__}: other bits with more threads"


def threads(draw: random.Random) -> None:
    """Several Python threads call ops at once, each on its own inputs and one of all."""
    torch.set_num_threads(draw.choice((1, 2)))
    shared = drawn_call(draw)
    calls = [[shared, *(drawn_call(draw) for _ in range(3))] for _ in range(draw.randint(2, 4))]
    expected = [[results(*call) for call in mine] for mine in calls]
    failures: list[str] = []

    def work(number: int) -> None:
        order = random.Random(number).sample(range(4), 4)
        for i in order:
            function, inputs = calls[number][i]
            if not same_bits(results_with_own_seed(function, inputs), expected[number][i]):
                failures.append(f"{function.__name__} in thread {number}")

    # Torch's generator is one for all threads: those that draw from it take turns.
    turns = threading.Lock()

    def results_with_own_seed(function: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
        if inputs.get("dropout_p"):
            with turns:
                return results(function, inputs)
        return results(function, inputs)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, f"other bits: {', '.join(failures)}"


class Computed(Dataset[bool]):
    """Whether a call in a worker gives the bits that it gave in the process that was forked."""

    def __init__(self, calls: Sequence[tuple[Callable[..., Any], Inputs]]) -> None:
        self.calls = calls
        self.expected = [results(*call) for call in calls]

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> bool:
        function, inputs = self.calls[i]
        return alike(function, results(function, inputs), self.expected[i])


def loader(draw: random.Random) -> None:
    """The workers of a DataLoader compute, after the process itself has on several threads."""
    torch.set_num_threads(2)
    data = Computed([drawn_call(draw) for _ in range(4)])
    same = [bool(x) for x in DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")]
    assert all(same), f"other bits in a worker: {[data.calls[i][0].__name__ for i, x in enumerate(same) if not x]}"


def forked(draw: random.Random) -> None:
    """A plain child, which keeps the number of threads that it finds."""
    torch.set_num_threads(2)
    function, inputs = drawn_call(draw, most=300)
    expected = results(function, inputs)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(0 if alike(function, results(function, inputs), expected) else 3)
    )
    child.start()
    child.join()
    assert child.exitcode == 0, f"{function.__name__} in a child: exit status {child.exitcode}"


class Broken(Exception):
    """Raised inside of a backward."""


def interrupted(draw: random.Random) -> None:
    """An exception in the middle of a backward comes out of it, and the next one is not disturbed."""
    torch.set_num_threads(draw.choice((1, 2)))
    function, inputs = drawn_call(draw)
    expected = results(function, inputs)

    def fail(_: Tensor) -> None:
        raise Broken

    before = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    given = pytree.tree_map_only(Tensor, lambda x: x * 1 if x.requires_grad else x, inputs)
    reached = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
    draw.choice(reached).register_hook(fail)
    outs = [x for x in pytree.tree_leaves(function(**given)) if x.requires_grad]
    if outs:
        with contextlib.suppress(Broken):
            torch.autograd.grad([x.float().sum() for x in outs], before, allow_unused=True)
    assert same_bits(results(function, inputs), expected), f"{function.__name__}: other bits after a failed backward"


def refused(draw: random.Random) -> None:
    """Arguments that do not fit are refused by name, and leave nothing behind."""
    function, inputs = drawn_call(draw)
    expected = results(function, inputs)
    name = draw.choice([name for name, x in inputs.items() if isinstance(x, Tensor) and x.dim()] or list(inputs))
    wrong = {**inputs, name: draw.choice(("seven", torch.zeros(3, 2, 1, 2, 3, 1, dtype=torch.int64)))}
    try:
        function(**wrong)
    except (TypeError, ValueError, RuntimeError) as error:
        assert str(error).startswith(f"{function.__name__}: "), f"not said by whom: {error}"
    else:
        raise AssertionError(f"{function.__name__} took {wrong[name]!r} for {name}")
    assert same_bits(results(function, inputs), expected), f"{function.__name__}: other bits after a refused call"


ACTIVITIES = (compare, compare, compare, threads, loader, forked, interrupted, refused)


# --- the run ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes that the process holds, without what the C library keeps for later."""
    gc.collect()
    if hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(samples: Sequence[int]) -> int:
    """By how much memory is larger in the last quarter of a run than in the second, in the middle of each."""
    quarter = len(samples) // 4
    if not quarter:
        return 0
    return int(statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run rounds; the exit status is 1 if one failed or memory grew."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default: %(default)g)")
    parser.add_argument("--rounds", type=int, help="so many rounds instead, however long they take")
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=300.0, metavar="SECONDS", help="that a round may take")
    args = parser.parse_args(argv)
    start, done, memory = time.monotonic(), Counter[str](), [resident()]
    number = args.first
    while number - args.first < args.rounds if args.rounds else time.monotonic() - start < 60 * args.minutes:
        draw = random.Random(f"{args.seed} {number}")
        torch.set_num_threads(1)
        activity = draw.choice(ACTIVITIES)
        faulthandler.dump_traceback_later(args.patience, exit=True)
        try:
            activity(draw)
        except KeyboardInterrupt:
            print(f"interrupted in round {number}, {activity.__name__}")
            break
        except Exception:
            print(f"round {number}, {activity.__name__}: repeat with --seed {args.seed} --first {number} --rounds 1")
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        done[activity.__name__] += 1
        number += 1
        if (number - args.first) % 20 == 0:
            memory.append(resident())
    more = growth(memory)
    print(
        f"{done.total()} rounds in {time.monotonic() - start:.0f} s, no mismatch: "
        + ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    )
    print("memory in MB: " + " ".join(f"{x >> 20}" for x in memory[:: max(1, len(memory) // 12)]))
    if more > MOST_GROWTH:
        print(f"memory grew by {more >> 20} MB")
    return int(more > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
