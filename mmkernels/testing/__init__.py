"""What the tests of this package are made of, for your own ops and models: ``docs/testing.md`` has a worked example.

- `assert_matches_reference` and `assert_close_to_oracle` hold results and gradients to the precision rule;
- `check_backends` does so for a model on every backend of this machine, and says which ops fell back;
- `example_inputs` and `random_inputs` make arguments for any op;
- `poisoned_memory` shows elements that nobody wrote, `same_bits` compares bit for bit;
- `fix_triton_interpreter` makes Triton's interpreter right for bfloat16.

With pytest come the options ``--mmkernels-backend`` and ``--mmkernels-isa`` and the fixture ``mmkernels_backends``.
"""

from __future__ import annotations

from mmkernels.testing.backends import BackendReport, Implementation, check_backends, implementations
from mmkernels.testing.inputs import example_inputs, op_names, random_inputs
from mmkernels.testing.memory import poisoned_memory, same_bits
from mmkernels.testing.oracle import assert_close_to_oracle, assert_matches_reference, check_op
from mmkernels.triton.interpreter import fix_triton_interpreter

__all__ = [
    "BackendReport",
    "Implementation",
    "assert_close_to_oracle",
    "assert_matches_reference",
    "check_backends",
    "check_op",
    "example_inputs",
    "fix_triton_interpreter",
    "implementations",
    "op_names",
    "poisoned_memory",
    "random_inputs",
    "same_bits",
]
