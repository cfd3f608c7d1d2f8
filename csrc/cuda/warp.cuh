// SPDX-License-Identifier: Apache-2.0
// Small device functions that several kernels share.
#pragma once

#include "cuda/device.h"

namespace drseg::cuda {

using namespace drseg::device;

constexpr float INFINITE = __builtin_huge_valf();
DRSEG_DEVICE float not_a_number() { return float_of(0x7fffffff); }

DRSEG_DEVICE float magnitude(float value) { return value < 0 ? -value : value; }
DRSEG_DEVICE int distance(int a, int b) { return a < b ? b - a : a - b; }
DRSEG_DEVICE bool is_number(float value) { return value == value; }

// A tree over the lanes, in one order; every lane has the result.
DRSEG_DEVICE float warp_total(float value) {
  DRSEG_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
// Of numbers that are not negative, whose bits order as they do.
DRSEG_DEVICE float warp_largest(float value) { return float_of(warp_max(bits_of(value))); }

}  // namespace drseg::cuda
