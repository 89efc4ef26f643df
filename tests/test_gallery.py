"""Every example of the gallery, with few steps, holds what it claims."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from environment import DEVICE

pytest.importorskip("sklearn", reason="the examples' digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
os.environ["MMKERNELS_ESPEAK"] = "0"  # one speaker on every machine
gallery = importlib.import_module("gallery")
EARLY, Example = (getattr(importlib.import_module("common.example"), name) for name in ("EARLY", "Example"))
TOO_LONG = 150
ELSEWHERE = DEVICE != "cpu" or os.environ.get("MMKERNELS_BACKEND") in ("triton", "simt", "cuda")


@pytest.mark.skipif(ELSEWHERE, reason="the examples train on the CPU, at the speed of its kernels")
@pytest.mark.parametrize("name", gallery.TOPICS)
def test_an_example_agrees_with_plain_torch_and_keeps_its_claims(name, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        failures = importlib.import_module(name).main(["--quick", "--picture", str(tmp_path / "picture.png")])
    finally:
        torch.set_num_threads(threads)
    assert failures == 0, capsys.readouterr().out


def test_the_gallery_shows_every_example_and_each_is_short():
    shown = {EXAMPLES / f"{name}.py" for name in gallery.TOPICS}
    assert shown == {path for path in EXAMPLES.glob("*.py") if "Example(__doc__" in path.read_text()}
    assert not [path.name for path in shown if len(path.read_text().splitlines()) > TOO_LONG]


class Slope(torch.nn.Module):
    def __init__(self, ops):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 2))

    def loss(self, x):
        return (x @ self.weight.mT).square().mean()


@pytest.mark.parametrize(("options", "steps"), [([], 40), (["--seconds", "3600"], 40), (["--seconds", "0"], EARLY)])
def test_seconds_end_a_training_after_the_steps_that_are_compared(options, steps):
    threads, taken = torch.get_num_threads(), []
    try:
        example = Example("An example.", options, trainings=2)
        for _ in range(2):
            example.train("slope", Slope, lambda step: taken.append(step) or (torch.ones(3, 2),), 40)
    finally:
        torch.set_num_threads(threads)
    assert example.failures == 0
    assert len(taken) == 2 * steps
