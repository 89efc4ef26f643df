"""Existing models, faster by one line: ``accelerate(model)``.

One file or folder per library, imported only where a model of it is met. `accelerate` swaps the
``forward`` of single modules for one over this library's ops and reports what it swapped and what it left, with the
reason; `restore` takes it back.
"""

from __future__ import annotations

from mmkernels.integrations._accelerate import accelerate, restore
from mmkernels.integrations._report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]
