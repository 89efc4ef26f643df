"""What the kernels of losses share: the softmax of a row of logits that a program walks over in blocks.

Every lane has a maximum and a sum of exponentials of its own, so that nothing is reduced before the end. The maximum is
taken off before the multiplication with ``scale``, so that what is rounded is the distance from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # in place of −inf, whose distance from itself is no number


@triton.jit
def no_logits(BLOCK: tl.constexpr):
    """Maximum and sum of lanes that have read nothing."""
    return tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)


@triton.jit
def with_logits(top, total, z, scale):
    """Maximum and sum of exponentials of every lane with another element."""
    most = tl.maximum(top, z)
    return most, total * tl.exp((top - most) * scale) + tl.exp((z - most) * scale)


@triton.jit
def of_lanes(top, total, scale):
    """Maximum and sum of the row; 0 where all of it is −inf."""
    most = tl.max(top, 0)
    return most, tl.sum(total * tl.exp((top - most) * scale), 0)
