"""Numbers and elements of tuples; tanh, softplus, the activations and their derivatives, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)
_QUICK_SLOPE = tl.constexpr(1.702)


@triton.jit
def number(x):
    """What `mmkernels.triton.launch.odd` was given."""
    return (x - 3) // 2


@triton.jit
def pick(xs, i):
    """xs[i] of a tuple of pointers or numbers, where i is known only as the kernel runs."""
    x = xs[0]
    for j in tl.static_range(1, len(xs)):
        x = tl.where(i == j, xs[j], x)
    return x


@triton.jit
def tanh(x):
    """Nothing overflows, and small arguments keep their relative accuracy."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    s = x * x
    small = x + x * s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    return tl.where(s < 0.0625, small, large)


@triton.jit
def sigmoid(x):
    """Of either sign without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + eˣ); the logarithm by its series, whose relative accuracy small arguments keep."""
    e = tl.exp(-tl.abs(x))
    q = e / (2.0 + e)  # log(1 + e) = 2 artanh q, and q is at most 1/3
    s = q * q
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * q * series


@triton.jit
def activation(x, KIND: tl.constexpr):
    """``KIND`` is an activation's name, or None for x itself."""
    if KIND == "relu":
        y = tl.where(x < 0, 0.0, x)  # NaN stays
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif KIND == "gelu_tanh":
        y = x * sigmoid((x + x * x * x * _CUBIC) * _SQRT_8_OVER_PI)  # (1 + tanh u) / 2 without its cancellation
    elif KIND == "silu":
        y = x * sigmoid(x)
    elif KIND == "tanh":
        y = tanh(x)
    elif KIND == "sigmoid":
        y = sigmoid(x)
    elif KIND == "quick_gelu":
        y = x * sigmoid(x * _QUICK_SLOPE)
    else:
        y = x
    return y


@triton.jit
def activation_derivative(x, KIND: tl.constexpr):
    """d activation / dx at x."""
    if KIND == "relu":
        d = tl.where(x <= 0, 0.0, x * 0.0 + 1.0)
    elif KIND == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = sigmoid((x + x * x * x * _CUBIC) * _SQRT_8_OVER_PI)
        d = s + x * s * (1.0 - s) * (1.0 + x * x * _CUBIC * 3.0) * _SQRT_8_OVER_PI
    elif KIND == "silu":
        s = sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif KIND == "tanh":
        t = tanh(x)
        d = 1.0 - t * t
    elif KIND == "sigmoid":
        s = sigmoid(x)
        d = s * (1.0 - s)
    elif KIND == "quick_gelu":
        s = sigmoid(x * _QUICK_SLOPE)
        d = s * (1.0 + x * _QUICK_SLOPE * (1.0 - s))
    else:
        d = x * 0.0 + 1.0
    return d
