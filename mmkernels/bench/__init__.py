"""The benchmark engine behind ``python -m mmkernels bench``.

A file ``benchmarks/<op>.py`` says what to measure (shapes, operations, plain torch); everything else is here:
``options`` and ``main`` (the command), ``suite`` (what such a file declares), ``shapes`` (which of it is measured),
``providers`` and ``plugin`` (who competes), ``plain`` (torch code that several share), ``case`` and ``engine`` (check,
then time), ``timing``, ``memory``, ``machine``, ``progress``, and what is left of a run: ``report``, ``compare``,
``summary``, ``plot``, ``html`` and ``svg``.
"""

from .plugin import op, provider
from .suite import Suite, Workload

__all__ = ["Suite", "Workload", "op", "provider"]
