"""A rank that does not come to a call is an error on the others, within the group's timeout."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import needs_gloo, results_of_ranks

pytestmark = needs_gloo


@pytest.mark.parametrize("absence", ["gone", "late"])
def test_the_error_names_the_op(absence: str, tmp_path: Path) -> None:
    signals = tmp_path / "signals"
    signals.mkdir()
    *others, _ = results_of_ranks("lost_ranks.py", 2, tmp_path, absence, str(signals))
    for said in others:
        assert said["attention"].startswith(
            "context_parallel_attention: group: expected every rank to take part in time"
        )
        assert said["loss"].startswith("contrastive_loss: group: expected every rank to take part in time")
