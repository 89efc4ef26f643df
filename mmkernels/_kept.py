"""What an op keeps for its backward: stated by the op, read by both ways of recording it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What an op keeps for its backward, besides what its kernels save.

    Only the arguments that a needed gradient depends on, in whatever derivative of it, are kept; the kernels of the
    backward find others' shapes, with any values. Tensors that nothing needs stay free to be changed or forgotten.

    Args:
        reads: for the gradient of an argument the names of the tensor arguments that it depends on, spaces in between;
            of one that is not named here: all but ``never``.
        never: names of arguments that no gradient depends on.
        outputs: whether the backward also gets the outputs, before the saved tensors.
    """

    reads: Mapping[str, str] = field(default_factory=dict)
    never: str = ""
    outputs: bool = False

    def table(self, names: Sequence[str]) -> tuple[int, ...]:
        """For each argument a bit mask of the arguments that its gradient depends on."""
        unknown = {*self.reads, *self.never.split(), *" ".join(self.reads.values()).split()}.difference(names)
        assert not unknown, f"{unknown} are no arguments"
        others = " ".join(name for name in names if name not in self.never.split())
        return tuple(sum(1 << names.index(x) for x in self.reads.get(name, others).split()) for name in names)


EVERYTHING = Kept()
EVERYTHING_AND_OUTPUTS = Kept(outputs=True)


def shape_of(leaf: Tensor) -> Callable[[], Tensor]:
    """Makes a tensor like this one but for its values."""
    shape, strides, dtype, device = leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)
