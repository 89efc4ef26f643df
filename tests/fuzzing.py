"""How the fuzz tests run."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


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
