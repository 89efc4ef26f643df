"""What the tests of losses of hidden states and heads share: checks, small chunks, how much memory there is in use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import op_contract as contract
import pytest

from mmkernels.ops import _linear_loss as linear_loss

CONTRACT = {
    "each gradient alone": contract.check_each_gradient_alone,
    "every element is written": contract.check_every_element_is_written,
    "func": contract.check_func,
    "checkpoint": contract.check_checkpoint,
}

_PEAK = """
import resource, torch, mmkernels as mmk
torch.set_num_threads(1)
def leaf(*shape):
    return torch.empty(shape).normal_(0, 0.05).requires_grad_()
def run(rows, classes, width):
    sizes = dict(rows=rows, classes=classes, width=width)
    leaves = [leaf(*(sizes[n] for n in names)) for names in {shapes}]
    labels = torch.randint(0, classes, (rows,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grads = torch.autograd.grad(({loss})(labels, *leaves), leaves)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - sum(g.nbytes for g in grads)
run(64, 64, 64)
print(run(2048, 32000, 64))
"""


def use_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows each."""
    monkeypatch.setattr(linear_loss, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(linear_loss, "_FEWEST_ROWS", 2)


def peak_bytes(loss: str, shapes: Sequence[tuple[str, ...]]) -> int:
    """Beyond leaves and gradients, in a process of its own, of ``loss``, a function of labels and leaves.

    2048 rows, 32 000 classes, a width of 64: logits are 250 MiB. A shape names its sizes.
    """
    script = _PEAK.replace("{shapes}", repr(list(shapes))).replace("{loss}", loss)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
