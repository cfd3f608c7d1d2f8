# SPDX-License-Identifier: Apache-2.0
"""What several kernels share: small device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_bits(value):
    """int32 that orders as the float32 does; the two zeros are equal, and no number maps to the lowest two integers."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def exp_minus(a):
    """exp(-a) for a of -89 to 104 in float32, within two units in the last place down to 2**-126; NaN passes.

    The hardware's exponential is exact in the absolute, so it loses digits in proportion to a.
    """
    # the nearest integer appears in the low bits of a sum of this size
    total = a * -1.44269504 + 12582912.0
    n = total - 12582912.0
    exponent = total.to(tl.int32, bitcast=True) - 0x4B400000
    # the remainder of the division by log(2), which is split in two so that no digit is lost
    r = (-a - n * 0.693145752) - n * 1.42860677e-6
    value = r * (1.0 / 5040) + 1.0 / 720
    value = value * r + 1.0 / 120
    value = value * r + 1.0 / 24
    value = value * r + 1.0 / 6
    value = value * r + 0.5
    value = value * r + 1.0
    value = value * r + 1.0
    # 2**n in two steps, each in range
    half = exponent >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return value * first * second


@triton.jit
def exp_negative(a):
    """exp(-a) for a >= 0 as ``exp_minus`` has it."""
    a = tl.where(a > 104.0, 104.0, a)
    return exp_minus(a)


@triton.jit
def exp_of(x):
    """exp(x) for every x as ``exp_minus`` has it, infinite above 88.7."""
    x = tl.where(x > 89.0, 89.0, x)
    return exp_minus(tl.where(x < -104.0, 104.0, -x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in float32, accurate relative to its value at both ends; NaN passes."""
    e = exp_negative(tl.abs(x))
    # log(1 + e) = 2 artanh(e / (2 + e))
    z = e / (2.0 + e)
    s = z * z
    series = s * (1.0 / 15) + 1.0 / 13
    series = series * s + 1.0 / 11
    series = series * s + 1.0 / 9
    series = series * s + 1.0 / 7
    series = series * s + 1.0 / 5
    series = series * s + 1.0 / 3
    series = series * s + 1.0
    return tl.where(x < 0.0, 0.0, x) + 2.0 * z * series


@triton.jit
def softplus_slope(w):
    """The derivative of softplus where its value is w >= 0, 1 - exp(-w) in float32, accurate near 0; NaN passes."""
    series = w * (-1.0 / 40320) + 1.0 / 5040
    series = series * w - 1.0 / 720
    series = series * w + 1.0 / 120
    series = series * w - 1.0 / 24
    series = series * w + 1.0 / 6
    series = series * w - 0.5
    series = series * w + 1.0
    return tl.where(w < 0.5, w * series, 1.0 - exp_negative(w))


@triton.jit
def scaled_slope(weight, exponent):
    """The derivative of softplus times exp(exponent), where that product is ``weight``.

    A weight of zero has no slope, whatever its exponent is.
    """
    factor = exp_of(exponent)
    return tl.where(weight == 0.0, 0.0, factor * softplus_slope(weight / factor))


@triton.jit
def within(index, nodes):
    """Neighbour indices clamped into [0, nodes), int64 so that offsets do not wrap."""
    return tl.minimum(tl.maximum(index, 0), nodes - 1).to(tl.int64)
