"""What docs/distributed.md says a step sends and holds: formulas against bytes that are counted, and its table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import spread_bytes as toys
from processes import needs_gloo, worlds_of

PATH = Path(__file__).parents[1] / "docs" / "distributed_costs.py"
RANKS = (2, 4)


def _loaded() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_costs", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for names
    spec.loader.exec_module(module)
    return module


costs = _loaded()


worlds = worlds_of("spread_bytes.py", RANKS)


def sent_on_paper(ranks: int) -> dict[str, float]:
    weights = toys.BLOCKS * (16 * 16 + 16)
    sides = (toys.ROWS, toys.FEATURES, ranks, 4)
    keys_and_values = 2 * toys.HEADS * toys.TOKENS * toys.WIDTH
    return {
        "fully_sharded": costs.fully_sharded(weights, ranks),
        "replicated": costs.replicated(weights, ranks),
        "contrastive": costs.contrastive(*sides),
        "sigmoid_ring": costs.sigmoid_ring(*sides),
        "context_ring": costs.context_ring(keys_and_values, ranks, 4),
        "context_ring, twice": costs.context_ring(keys_and_values, ranks, 4, forwards=2),
        "context_gather": costs.context_gather(keys_and_values, ranks, 4),
        "row_parallel": costs.row_parallel(toys.ROWS * toys.OUTPUTS, ranks, 4),
    }


@needs_gloo
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", sent_on_paper(2))
def test_bytes_that_are_sent_are_those_of_the_formula(
    name: str, ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    for world in worlds[ranks]:
        assert world["sent"][name] == pytest.approx(sent_on_paper(ranks)[name])
        assert world["told"][name] < 1000


@needs_gloo
@pytest.mark.parametrize("ranks", RANKS)
def test_parts_go_no_further_than_a_rank_that_computes_with_them(
    ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    part = 2 * toys.HEADS * toys.TOKENS * toys.WIDTH / ranks * 4
    reaches = {"window": [1] * (ranks - 1) + [0], "causal": list(range(ranks - 1, -1, -1))}
    for name, steps in reaches.items():
        # A part travels forward and backward; the sum of its gradients goes as far, and home.
        sent = sum(part * (3 * reach + (reach > 0)) for reach in steps)
        assert sum(world["sent"][name] for world in worlds[ranks]) == sent


@needs_gloo
@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_that_are_held_are_those_of_the_formula(ranks: int, worlds: dict[int, list[dict[str, Any]]]) -> None:
    elements = 16 * toys.HEADS * toys.TOKENS * toys.WIDTH
    ring = costs.context_memory(2 * elements, elements, ranks, 4)
    for world in worlds[ranks]:
        assert world["states"] == costs.states(toys.BLOCKS * (16 * 16 + 16), ranks)
        assert world["checkpoints"] == costs.checkpointed(toys.BLOCKS * toys.ROWS * 8, 4)
        assert world["batch"] == costs.contrastive_memory(toys.ROWS, toys.FEATURES, 4)
        # The outputs of one part, as they are joined, come on top.
        assert ring <= world["ring"] <= ring + 4 * elements * 4 / ranks, (world["ring"], ring)


def test_the_table_is_what_the_formulas_give() -> None:
    page = costs.PAGE.read_text(encoding="utf-8")
    assert costs.BEGIN in page and costs.END in page
    assert costs.updated(page) == page


def test_the_table_has_every_model_and_number_of_gpus() -> None:
    rows = [line for line in costs.table().splitlines() if line.endswith(" |")]
    assert len(rows) == 1 + len(costs.MODELS) * len(costs.GPUS)
    for model in costs.MODELS:
        for ranks in costs.GPUS:
            step = model.step(ranks)
            assert all(size > 0 for size in (*step.traffic.values(), *step.memory.values()))
