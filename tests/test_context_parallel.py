"""Attention over keys that are spread over processes is that of one process with all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from context_parallel import CASES, RANKS
from processes import needs_gloo, worlds_of

import mmkernels as mmk
from mmkernels.distributed import context_parallel_attention, shard_positions
from mmkernels.testing import assert_close_to_oracle

pytestmark = needs_gloo


worlds = worlds_of("context_parallel.py", RANKS)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_spread_keys_give_the_outputs_and_gradients_of_one_process(
    name: str, ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    case = CASES[name]
    with mmk.use_backend("reference"):
        alone, oracle = case.alone(), case.alone(torch.float64)
    for rank, world in enumerate(worlds[ranks]):
        results = world["results"][name]
        assert len(results) == len(alone)
        for i, (got, at) in enumerate(zip(results, world["held"][name], strict=True)):
            plain, exact = (x[i] if at is None else x[i][:, :, at] for x in (alone, oracle))
            absent = exact == -torch.inf
            assert torch.equal(got == -torch.inf, absent)
            got, plain, exact = (x.masked_fill(absent, 0) for x in (got, plain, exact))
            scale = float(oracle[i].masked_fill(oracle[i] == -torch.inf, 0).abs().max()) if oracle[i].numel() else 1.0
            assert_close_to_oracle(got, plain, exact, name=f"result {i} of rank {rank}", scale=scale)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_process_group_and_the_reference_serve_as_well(ranks: int, worlds: dict[int, list[dict[str, Any]]]) -> None:
    for world in worlds[ranks]:
        for got, expected in zip(world["reference"], world["results"]["ring"], strict=True):
            torch.testing.assert_close(got, expected)


def test_memory_of_a_rank_shrinks_with_the_ranks(worlds: dict[int, list[dict[str, Any]]]) -> None:
    two, four = (max(world["memory"] for world in worlds[ranks]) for ranks in (2, 4))
    assert four < 0.6 * two


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_that_do_not_agree_are_all_told(ranks: int, worlds: dict[int, list[dict[str, Any]]]) -> None:
    op = "context_parallel_attention: "
    for world in worlds[ranks]:
        said = world["messages"]
        assert said["features"].startswith(f"{op}group: expected ranks that agree on their features; got [7, 8")
        assert said["streams"].startswith(f"{op}group: expected ranks that agree on their number of query streams")
        assert said["scale"].startswith(f"{op}group: expected ranks that agree on their scale")
        assert said["gradients"].startswith(f"{op}group: expected ranks that agree on their query's need of a gradient")
        assert said["zigzag"].startswith(f"{op}order: expected the shards that shard_positions")
        assert said["lengths"].startswith(f"{op}key_lengths[0]: expected values in [0, {6 * ranks}]")
        assert said["window"].startswith(f"{op}group: expected ranks that agree on their window's left side; got [1, 0")
        assert said["mask"].startswith(
            f"{op}attn_mask: expected {6 * ranks} in its last dim, the keys of all ranks, or 1"
        )
        assert said["sinks"].startswith(f"{op}sinks: expected None for several streams")
        assert said["alignment"].startswith(
            f"{op}group: expected ranks that agree on their causal_alignment; got [1, 0"
        )
        assert said["lengths to the bottom right"].startswith(
            f"{op}causal_alignment: expected 'top_left' with key_lengths"
        )
        assert said["streams to the bottom right"].startswith(
            f"{op}causal_alignment: expected 'top_left' for several streams"
        )
        assert said["bias"].startswith(f"{op}attn_bias: expected {6 * ranks} in its last dim, as in attn_mask")
        assert said["bias of streams"].startswith(f"{op}attn_bias: expected None for several streams")
        assert said["causal"].startswith(f"{op}is_causal: expected False for several streams")


def test_what_is_no_mesh_is_refused() -> None:
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(TypeError, match="context_parallel_attention: mesh: expected a DeviceMesh or a ProcessGroup"):
        context_parallel_attention(x, x, x, "gloo")
    with pytest.raises(TypeError, match="shard_positions: mesh: expected a DeviceMesh or a ProcessGroup"):
        shard_positions(6, None)


@pytest.mark.parametrize("argument", ["dropout_p", "stream_bias"])
def test_what_is_not_offered_is_named(argument: str) -> None:
    x = torch.randn(1, 2, 6, 8)
    with pytest.raises(TypeError, match=rf"context_parallel_attention\(\) .* '{argument}'"):
        context_parallel_attention(x, x, x, None, **{argument: 0.5})
