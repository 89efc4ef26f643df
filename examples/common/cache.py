"""What is made once and kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def directory() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmkernels" / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(name: str, rule: str, make: Callable[[], Any]) -> Any:
    """What `make` returns, from the file of an earlier call with the same rule if there is one.

    The rule is all that decides what is made: the source of the code, and what that reads.
    """
    path = directory() / f"{name}-{hashlib.sha256(rule.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")  # renamed when complete: examples may run at the same time
        torch.save(make(), unfinished)
        unfinished.replace(path)
    return torch.load(path)
