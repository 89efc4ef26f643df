"""Every op of DTensors, wherever they are placed, is that of the whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from calls import CALLS, FIRST
from processes import needs_gloo, results_of_ranks, worlds_of
from sharded_ops import SHAPES

import mmkernels as mmk
from mmkernels.distributed.sharding_rules import RULES

pytestmark = needs_gloo


worlds = worlds_of("sharded_ops.py", SHAPES)


@pytest.mark.parametrize("ranks", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_any_placement_gives_the_outputs_and_gradients_of_the_whole(
    name: str, ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    for world in worlds[ranks]:
        errors = world["errors"][name]
        assert len(errors) > 1
        assert max(errors.values()) < 1e-9, errors


def test_compiled_calls_give_the_outputs_and_gradients_of_the_whole(tmp_path: Path) -> None:
    for world in results_of_ranks("sharded_compiled.py", 2, tmp_path):
        assert set(world) == {*FIRST, "module"}
        assert max(world.values()) < 1e-9, world


def test_what_is_placed_well_stays_there(worlds: dict[int, list[dict[str, Any]]]) -> None:
    assert worlds[2][0]["kept"] == {
        "heads": "(Shard(dim=1),)",
        "queries": "(Shard(dim=2),)",
        "batch": "(Shard(dim=0),)",
        "columns": "(Shard(dim=1),)",
        "rows": "(Shard(dim=0),)",
        "loss": "(Replicate(),)",
    }


def test_sums_over_features_and_rows_are_taken_of_the_terms_of_the_ranks(
    worlds: dict[int, list[dict[str, Any]]],
) -> None:
    for world in worlds[2]:
        for name, (error, placements, collectives) in world["summed"].items():
            assert error < 1e-12, name
            is_whole = name in ("losses", "divergence", "sources, epilogue", "normed sources")
            assert placements == ("(Replicate(),)" if is_whole else "(Partial(sum),)"), name
            needs = is_whole or "normed" in name
            assert collectives == (["all_reduce"] if needs else []), name


@pytest.mark.parametrize("ranks", SHAPES)
def test_spread_modules_give_the_outputs_and_gradients_of_plain_ones(
    ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    for world in worlds[ranks]:
        for name, (error, _) in world["modules"].items():
            assert error < 1e-9, name
        sharded = {name: parts for name, (_, parts) in world["modules"].items()}
        assert sharded["ConcatFusion"] == ["weight", "bias"] and sharded["rows"] == ["weight"]
        assert set(sharded["LowRankFusion"]) == {"bias", "factors.0", "factors.1"}
        assert "feedforward_out.weight" in sharded["GatedCrossAttentionBlock"]
        of_heads = {"query_proj.weight", "out_proj.weight"}
        assert of_heads.issubset(sharded["GatedCrossAttentionBlock"]) == (ranks == 2)  # which has two heads
        assert "q_proj_weight" in sharded["heads of weights of their own"]


def test_plain_tensors_among_them_and_dropout_are_refused(worlds: dict[int, list[dict[str, Any]]]) -> None:
    for world in worlds[2]:
        mixed, dropout, kind, rows = world["messages"]
        assert kind == "ModuleParallel: module: expected one of mmkernels.nn; got Linear"
        assert rows == "ModuleParallel: rows: expected False but for a ConcatFusion; got GatedFusion"
        assert mixed == "cross_attention: value: expected a DTensor, as others are; got Tensor"
        assert dropout.startswith("cross_attention: dropout_p: expected 0 for DTensors")


def test_every_op_has_a_rule_and_every_output_the_dims_that_may_be_sharded() -> None:
    ops = {name for name in mmk.__all__ if callable(getattr(mmk, name)) and not isinstance(getattr(mmk, name), type)}
    assert ops - {"explain", "use_backend"} == set(RULES)
    for name, rule in RULES.items():
        for output in rule.outputs:
            dims = set((output if isinstance(output, str) else max(output.values(), key=len)).split())
            free = {"g" if dim == "h" and "g" in dims else dim for dim in rule.free.split()}  # key heads follow
            assert free <= dims, name
