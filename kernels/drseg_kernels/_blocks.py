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
