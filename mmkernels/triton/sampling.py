"""Where samples of a map lie and what they read, for Triton kernels: positions, corners, shares, pixels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_level(levels, level):
    """First row in its source, width, height, and first cell of a head of a level; its entries in ``_tables``."""
    return (
        tl.load(levels + level * 4),
        tl.load(levels + level * 4 + 1),
        tl.load(levels + level * 4 + 2),
        tl.load(levels + level * 4 + 3),
    )


@triton.jit
def read_position(locations, at, here, width, height, DISCRETE: tl.constexpr):
    """x and y in pixels, whole ones if discrete, and whether the point samples the map; 0 where it does not."""
    x = tl.load(locations + at, mask=here, other=0.0).to(tl.float32)
    y = tl.load(locations + at + 1, mask=here, other=0.0).to(tl.float32)
    reaches = here & (width > 0) & (height > 0)
    if DISCRETE:
        reaches = reaches & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        x = tl.minimum(tl.maximum(tl.floor(x * width + 0.5), 0.0), width - 1.0)
        y = tl.minimum(tl.maximum(tl.floor(y * height + 0.5), 0.0), height - 1.0)
    else:
        x = x * width - 0.5
        y = y * height - 0.5
        reaches = reaches & (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)  # not where either is NaN
    return tl.where(reaches, x, 0.0), tl.where(reaches, y, 0.0), reaches


@triton.jit
def corner_of(x, y, reaches, width, height, CORNER: tl.constexpr):
    """The pixel left or right of x, above or below y, its share, and whether there is one."""
    left, top = tl.floor(x), tl.floor(y)
    column = left.to(tl.int32) + CORNER % 2
    line = top.to(tl.int32) + CORNER // 2
    across = x - left if CORNER % 2 == 1 else 1.0 - (x - left)
    down = y - top if CORNER // 2 == 1 else 1.0 - (y - top)
    valid = reaches & (column >= 0) & (column < width) & (line >= 0) & (line < height)
    return line * width + column, across * down, valid


@triton.jit
def read_pixels(value, first, pixel, valid, batch, head, c, features, value_batch, value_row, value_head):
    """[ROWS, BLOCK] in float32, 0 where not valid."""
    at = batch * value_batch + head * value_head + (first + pixel).to(tl.int64) * value_row
    mask = valid[:, None] & (c < features)[None, :]
    return tl.load(value + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def is_present(presence, inside, batch, source, presence_batch, presence_source):
    here = inside
    if presence is not None:
        flag = tl.load(presence + batch * presence_batch + source * presence_source, mask=inside, other=0)
        here = inside & (flag != 0)
    return here
