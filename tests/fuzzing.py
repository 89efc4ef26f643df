"""How the fuzz tests run."""

from __future__ import annotations

import os
from collections.abc import Collection

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONG = 3500  # beyond what any kernel cuts a dimension into


def fuzz(examples: int) -> settings:
    """So many examples, the same ones every time, or MMKERNELS_FUZZ_EXAMPLES others."""
    asked = os.environ.get("MMKERNELS_FUZZ_EXAMPLES")
    return settings(
        max_examples=examples if asked is None else int(asked),
        deadline=None,
        database=None,
        derandomize=asked is None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@st.composite
def long_sizes(draw: st.DrawFn, names: Collection[str], product: int) -> dict[str, int]:
    """Mostly none of them; else two that are long, with no more than this as their product."""
    if draw(st.integers(0, 3)):
        return {}
    first, second = draw(st.lists(st.sampled_from(sorted(names)), min_size=2, max_size=2))
    size = draw(st.integers(1, min(LONG, product)))
    return {second: draw(st.integers(1, min(LONG, product // size)))} | {first: size}
