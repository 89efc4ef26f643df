"""Triton's interpreter, made right for bfloat16.

Up to triton 3.9 the interpreter keeps bfloat16 as its bits in uint16. Its ``tl.dot`` multiplies these bits as integers,
its cast from float32 cuts the low half off where hardware rounds to nearest even, and its casts from and to any other
type convert the bits. All of it is silent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_FIXED = "_mmkernels_bfloat16"


def fix_triton_interpreter() -> None:
    """Make ``TRITON_INTERPRET=1`` multiply and cast bfloat16 by value, and round as hardware does, in this process.

    For any Triton kernel, not only those of this package. Calling it again changes nothing.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, _FIXED, False):
        return
    handle = interpreter.TensorHandle
    create_dot, cast_impl = builder.create_dot, builder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar == tl.bfloat16) == (to.scalar == tl.bfloat16):
            return cast_impl(self, source, to)
        if source.dtype.scalar == tl.bfloat16:
            return cast_impl(self, widened(source), to)
        values = np.ascontiguousarray(source.data, dtype=np.float32)
        bits = values.view(np.uint32)
        with np.errstate(over="ignore"):
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)

    builder.create_dot = dot
    builder.cast_impl = cast
    setattr(builder, _FIXED, True)
