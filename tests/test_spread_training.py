"""A model of three modalities that several processes train is the one that a single process trains."""

from __future__ import annotations

import itertools
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


def test_the_example_has_the_losses_of_one_process() -> None:
    script = Path(__file__).parents[1] / "examples" / "distributed_training.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment_of_ranks(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] != ["step"]]
    assert len(rows) == 20
    for _, one, many in rows:
        assert float(many) == pytest.approx(float(one), abs=1e-4)
    assert float(rows[-1][1]) < 0.5 * float(rows[0][1])
