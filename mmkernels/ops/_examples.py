"""What the calls that an op states as its examples are made of: `example_inputs` of each ``reference.py``.

``example_inputs(draw, **sizes)`` gives calls of the public function by the options that they have, each a dict of its
arguments by name; together they have every option that a kernel treats in a way of its own. The tests of what torch
asks of every op (``tests/test_contract*.py``) come from them. Any size may be 0. ``B`` counts examples, ``L…`` tokens,
``T…`` tokens of a packed batch, ``H``, ``M`` and ``R`` heads, modalities and ranks; other sizes are widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Examples = dict[str, dict[str, Any]]


class Draw:
    """Random tensors of a dtype on torch's default device, the same for the same seed but for rounding."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype = dtype
        device = torch.get_default_device()
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """Of the normal distribution, half as wide."""
        return (torch.randn(shape, generator=self._generator, dtype=torch.float64) / 2).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        """The same in float32 at least."""
        return self(*shape).to(torch.promote_types(self.dtype, torch.float32))

    def uniform(self, *shape: int) -> Tensor:
        """From 0 to 1."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def flags(self, *shape: int) -> Tensor:
        """Some True and some False, True first in every row."""
        drawn = torch.rand(shape, generator=self._generator) > 0.4
        if drawn.numel():
            drawn[..., 0] = True
        return drawn

    def whole(self, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0; zeros where ``below`` is 0."""
        return torch.randint(0, max(below, 1), shape, generator=self._generator)
