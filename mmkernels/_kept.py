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
        added: names of arguments that are added to the first output, whose gradient theirs is: eager calls return it
            as it came, and ask no kernel for a copy.
        outputs: whether the backward also gets the outputs, before the saved tensors.
    """

    reads: Mapping[str, str] = field(default_factory=dict)
    never: str = ""
    added: str = ""
    outputs: bool = False

    def table(self, names: Sequence[str]) -> tuple[int, ...]:
        """For each argument a bit mask of the arguments that its gradient depends on."""
        named = " ".join((self.never, self.added, *self.reads, *self.reads.values()))
        unknown = set(named.split()).difference(names)
        assert not unknown, f"{unknown} are no arguments"
        others = " ".join(name for name in names if name not in self.never.split())
        return tuple(_bits(self.reads.get(name, others), names) for name in names)

    def bits_of_added(self, names: Sequence[str]) -> int:
        """A bit mask of the arguments that are added."""
        return _bits(self.added, names)


def _bits(chosen: str, names: Sequence[str]) -> int:
    return sum(1 << names.index(name) for name in chosen.split())


EVERYTHING = Kept()
EVERYTHING_AND_OUTPUTS = Kept(outputs=True)


def shape_of(leaf: Tensor) -> Callable[[], Tensor]:
    """Makes a tensor like this one but for its values."""
    shape, strides, dtype, device = leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return lambda: torch.empty_strided(shape, strides, dtype=dtype, device=device)
