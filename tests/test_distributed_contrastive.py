"""The contrastive losses of a batch that is spread over processes are those of one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import needs_gloo, worlds_of
from spread_batches import CASES, COUNTS, rows_of

import mmkernels as mmk
from mmkernels.testing import assert_close_to_oracle

pytestmark = needs_gloo


worlds = worlds_of("spread_batches.py", COUNTS)


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_a_spread_batch_has_the_loss_and_the_gradients_of_one_process(
    name: str, ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    case = CASES[name]
    with mmk.use_backend("reference"):
        alone, oracle = case.results(), case.results(dtype=torch.float64)
    for rank, world in enumerate(worlds[ranks]):
        rows = rows_of(rank, ranks)
        for i, (got, plain, exact) in enumerate(zip(world["results"][name], alone, oracle, strict=True)):
            what = ("loss", "x", "y", "logit_scale", "logit_bias")[i]
            if what in ("x", "y"):
                plain, exact = plain[rows], exact[rows]
            scale = max(float(t.abs().max()) for t in oracle[1:])
            assert_close_to_oracle(got, plain, exact, name=f"{what} of rank {rank}", scale=scale)


@pytest.mark.parametrize("ranks", COUNTS)
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_loss_and_gradients_of_scalars(
    name: str, ranks: int, worlds: dict[int, list[dict[str, Any]]]
) -> None:
    first, *others = [[r[0], *r[3:]] for r in (world["results"][name] for world in worlds[ranks])]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("ranks", COUNTS)
def test_ranks_that_do_not_agree_are_all_told(ranks: int, worlds: dict[int, list[dict[str, Any]]]) -> None:
    for world in worlds[ranks]:
        tensors, gradients, features = world["messages"]
        assert "contrastive_loss: group: expected ranks that agree on their tensors" in tensors
        assert tensors == gradients.replace(gradients.split("got")[1], tensors.split("got")[1])
        assert "expected ranks that agree on their features; got [18, 19" in features


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_what_is_no_group_is_refused(name: str) -> None:
    case = CASES[name]
    with pytest.raises(TypeError, match=r"loss: group: expected a torch.distributed.ProcessGroup or None; got str"):
        case.loss(case.leaves(), slice(None), "gloo")


def test_without_a_group_nothing_of_it_is_imported() -> None:
    script = """
import sys, torch, mmkernels as mmk
x = torch.randn(5, 3)
mmk.contrastive_loss(x, x, 2.0), mmk.sigmoid_contrastive_loss(x, x, 2.0, 0.0)
print("mmkernels.distributed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout == "False\n"
