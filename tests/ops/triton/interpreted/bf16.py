"""Makes Triton's interpreter compute with bf16 as a GPU does.

It keeps bf16 as the bits of an integer and does integer arithmetic on them. Here every operation on bf16 is done in fp32
and its result rounded to the nearest bf16, ties to even.
"""

from functools import wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(x):
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widen(x):
    """bf16 as fp32; anything else as it is."""
    if not _is_bf16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(x):
    """fp32 rounded to bf16."""
    bits = np.ascontiguousarray(x.data.astype(np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def install():
    """Changes the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "_computes_bf16", False):
        return
    InterpreterBuilder._computes_bf16 = True
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    @wraps(dot)
    def create_dot(self, a, b, accumulator, *rest):
        return dot(self, widen(a), widen(b), accumulator, *rest)

    @wraps(cast)
    def cast_impl(self, source, target):
        if _is_bf16(source):
            wide = widen(source)
            return wide if target.scalar == tl.float32 else cast(self, wide, target)
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_floating():
            return narrow(source)
        return cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _in_fp32(method):
    @wraps(method)
    def wrapped(self, *arguments):
        *operands, op = arguments
        if not any(map(_is_bf16, operands)):
            return method(self, *arguments)
        result = method(self, *map(widen, operands), op)
        return result if result.dtype.scalar == tl.int1 else narrow(result)

    return wrapped
