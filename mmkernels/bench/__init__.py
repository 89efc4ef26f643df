"""The benchmark engine behind ``python -m mmkernels bench``.

A file ``benchmarks/<op>.py`` says what to measure (shapes, operations, plain torch); everything else is here: ``suite``
(what such a file declares), ``plain`` (torch code that several share), ``case`` and ``engine`` (check, then time),
``timing``, ``machine``, ``report`` and ``plot``.
"""

from .suite import Suite, Workload

__all__ = ["Suite", "Workload"]
