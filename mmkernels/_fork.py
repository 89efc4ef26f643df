"""A child of ``os.fork`` computes on one thread, as the workers of torch's DataLoader do.

The threads of OpenMP do not live on in a child, and its runtime there waits for them: torch's parallel ops hang, and so
would this package's. A child whose parent has never computed on several threads may call ``torch.set_num_threads``.
"""

from __future__ import annotations

import os

import torch


def _in_child() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def watch_forks() -> None:
    """From now on, in this process and its children."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)
