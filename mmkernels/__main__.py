"""`python -m mmkernels info | bench | kernels`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m mmkernels {info,bench,kernels} [options]

  info     versions, instruction sets, threads and backends of this machine
  bench    correctness and speed of the ops on this machine (--help lists its options)
  kernels  the Triton kernels compiled for GPUs that need not be here, and what each takes of them
"""


def main(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    # Imported late: the benchmark's own dependencies are no dependencies of the package.
    if command == "info":
        from mmkernels._info import main as run
    elif command == "bench":
        from mmkernels.bench.main import main as run
    elif command == "kernels":
        from mmkernels.triton.table import main as run
    else:
        asked_for_help = command in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    return run(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
