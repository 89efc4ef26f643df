"""A model of three modalities that several processes train is the one that a single process trains."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import environment_of_ranks, needs_gloo, results_of_ranks
from spread_training import WAYS, in_one_process, loaded, model

pytestmark = needs_gloo


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where four ranks leave what they trained."""
    return str(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def of_four(kept: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_ranks("spread_training.py", 4, tmp_path_factory.mktemp("four"), kept)


@pytest.fixture(scope="module")
def of_two(kept: str, of_four: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of_ranks("spread_training.py", 2, tmp_path_factory.mktemp("two"), kept)


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_weights_are_those_of_one_process(way: str, of_two: list[dict[str, Any]]) -> None:
    losses, weights = in_one_process(way)
    loss_error, weight_error = (0.03, 0.03) if "bfloat16" in way else (1e-5, 1e-5)
    assert max(abs(a - b) for a, b in itertools.pairwise(losses)) > 0.05, "nothing was learnt"
    for rank in of_two:
        found_losses, found_weights = rank[way]
        assert found_losses == pytest.approx(losses, abs=loss_error)
        assert found_weights.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found_weights[name], weight, atol=weight_error, rtol=0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_four_processes_save_two_and_one_load(
    kept: str, of_four: list[dict[str, Any]], of_two: list[dict[str, Any]]
) -> None:
    expected = of_four[0]
    alone = loaded(kept, model()).state_dict()
    assert not torch.equal(model().state_dict()["head.weight"], expected["head.weight"]), "nothing was trained"
    for state in (*of_four, *(rank["loaded"] for rank in of_two), alone):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], x) for name, x in expected.items())


@pytest.mark.parametrize(
    "command",
    [
        ("2", "distributed_training.py"),
        ("4", "distributed_training.py", "--loss", "sigmoid"),
        ("2", "staged_training.py"),
        ("2", "pipeline_training.py"),
    ],
    ids=" ".join,
)
def test_an_example_has_the_losses_of_one_process(command: tuple[str, ...]) -> None:
    ranks, script, *options = command
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    path = Path(__file__).parents[1] / "examples" / script
    environment = environment_of_ranks()
    done = subprocess.run([*run, path, *options], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    title, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert "one process" in title
    losses = [[float(x) for x in row.split()[-2:]] for row in rows]
    assert len(losses) >= 12
    for one, many in losses:
        assert many == pytest.approx(one, abs=1e-4)
    assert losses[-1][0] < 0.5 * losses[0][0]


def test_frozen_encoders_of_the_staged_example_have_no_backward() -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "staged_training.py"))
    model, (views, label) = example["Model"](), example["batch"](0)

    def nodes(stage: str) -> int:
        """How many operations the backward of a stage has."""
        for name, part in model.named_children():
            part.requires_grad_(name in example["STAGES"][stage])
        model.zero_grad()
        loss = model(views, label, stage)
        seen, ahead = set(), [loss.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in seen:
                seen.add(node)
                ahead += [following for following, _ in node.next_functions]
        loss.backward()
        trained = {name for name, part in model.named_children() if all(p.grad is not None for p in part.parameters())}
        assert trained == set(example["STAGES"][stage])
        return len(seen)

    frozen, everything = nodes("fusion"), nodes("all")
    weights = len(list(model.encoders.parameters()))
    assert everything >= frozen + 2 * weights  # a weight's end of the graph, and an operation that leads there
