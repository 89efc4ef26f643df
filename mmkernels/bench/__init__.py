"""The benchmark engine behind ``python -m mmkernels bench``.

A file ``benchmarks/<op>.py`` says what to measure (shapes, operations, bytes, baselines); everything else is here:
``case`` (what such a file provides), ``engine`` (check, then time), ``timing``, ``machine``, ``report`` and ``plot``.
"""

from .case import Case, Problem

__all__ = ["Case", "Problem"]
