"""What happens to a process: forks, exits during a call, imports with every warning an error, a short soak."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from environment import DEVICE

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's threads")


def python(code: str, *options: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which nothing is set that the tests set for themselves."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MMKERNELS_KEEP", "MMKERNELS_TEST", "TRITON_"))}
    own |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=timeout)


FORK = """
import os, sys, torch
import mmkernels as mmk
torch.set_num_threads(2)
inputs = [torch.randn(512, 300), torch.randn(512, 300)], torch.randn(512, 600, requires_grad=True)

def work():
    out = mmk.concat_linear(*inputs)
    return torch.autograd.grad(out.square().mean(), inputs[1])[0]

work()
child = os.fork()
if child == 0:
    print("threads", torch.get_num_threads())
    work(), torch.randn(600, 600) @ torch.randn(600, 600)
    sys.stdout.flush()
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_of_a_process_that_used_threads_computes_on_one() -> None:
    run = python(FORK)
    assert run.returncode == 7 and run.stdout == "threads 1\n", run.stderr


def test_the_interpreter_exits_while_a_thread_is_inside_of_a_call() -> None:
    """It waits for the thread. One that it does not wait for, a daemon, takes it down in torch's own calls too."""
    code = """
import threading, torch
import mmkernels as mmk
torch.set_num_threads(2)
q, k = torch.randn(2, 8, 300, 64, requires_grad=True), torch.randn(2, 8, 300, 64)
running, left = threading.Event(), threading.Event()
threading._register_atexit(left.set)  # called when the interpreter begins to shut down

def work():
    while True:
        last = left.is_set()
        out = mmk.cross_attention(q, k, k)
        running.set()
        torch.autograd.grad(out.sum(), q)
        if last:
            break
    print("done", flush=True)

threading.Thread(target=work).start()
running.wait()
print("leaving", flush=True)
"""
    run = python(code)
    assert run.returncode == 0 and run.stdout == "leaving\ndone\n" and run.stderr == ""


def test_no_warning_on_import() -> None:
    """With all of Python's checks, and where torch itself comes without one, as it is imported first."""
    code = """
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
import mmkernels, mmkernels.testing, mmkernels.nn
"""
    run = python(code, "-W", "error", "-X", "dev")
    assert run.returncode == 0 and run.stderr == "", run.stderr


def test_a_short_soak_finds_nothing() -> None:
    run = python("import sys, soak; sys.exit(soak.main(['--rounds', '40', '--first', '1000']))", timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    said = re.match(r"40 rounds in \d+ s, no mismatch: (.*)", run.stdout)
    assert said and all(activity.__name__ in said[1] for activity in soak.ACTIVITIES), run.stdout


def test_a_soak_notices_memory_that_grows_and_no_other() -> None:
    assert soak.growth([100 + 10 * i for i in range(40)]) >= 200
    assert soak.growth([10, 300, 100, *(100 + 50 * (i % 2) for i in range(37))]) <= 50


def test_a_soak_stops_at_a_mismatch_and_says_how_to_repeat_it() -> None:
    code = """
import soak
soak.ACTIVITIES = (soak.threads,)
soak.same_bits = lambda *_: False
soak.main(["--rounds", "3", "--first", "5"])
"""
    run = python(code)
    assert run.returncode == 1 and "AssertionError: other bits" in run.stderr
    assert "round 5, threads: repeat with --seed 0 --first 5 --rounds 1" in run.stdout
