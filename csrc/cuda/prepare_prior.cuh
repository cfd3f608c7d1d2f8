// SPDX-License-Identifier: Apache-2.0
// A prior's rows scaled by exact powers of two, the inverse of their norms, and what rounding to float16 takes from them.
#pragma once

#include "cuda/warp.cuh"

namespace drseg::cuda {

// The power of two that brings `top` near one, by the exponent that frexp gives: subnormal values scale like the smallest
// normal ones, zero not at all, and what is not finite by one half.
DRSEG_DEVICE float power_below(float top, bool broken) {
  int exponent = ((bits_of(top) >> 23) & 255) - 126;
  exponent = broken ? 1 : top == 0 ? 0 : exponent > 126 ? 126 : exponent;
  return float_of((127 - exponent) << 23);
}

// A row by a warp: (B * N, D), read twice, the second time from the cache. `rounds` is of float32.
template <class T, bool SCALES, bool ROUNDS>
DRSEG_KERNEL(128, 8)
prepare_rows(
    Global<const T> prior, Global<T> scaled, Global<float> inverse_norm, Global<half> rounded, Global<float> residual,
    int rows, int channels) {
  const int row = int(block_index().x) * 4 + warp_index(), lane = lane_index();
  if (row >= rows) return;
  const int64_t start = int64_t(row) * channels;
  float largest = 0;
  bool broken = false;
  for (int d = lane; d < channels; d += LANES) {
    const float size = magnitude(widen(prior.get(start + d)));
    largest = size > largest ? size : largest;
    // true of infinity, and of NaN, which compares with nothing
    broken |= !(size < INFINITE);
  }
  broken = ballot(broken) != 0;
  const float scale = power_below(warp_largest(largest), broken);
  float total = 0, lost = 0;
  for (int d = lane; d < channels; d += LANES) {
    const T given = prior.get(start + d);
    const T value = SCALES ? narrow<T>(widen(given) * scale) : given;
    scaled.set(start + d, value);
    const float wide = widen(value);
    total = fma(wide, wide, total);
    if constexpr (ROUNDS) {
      const half near = narrow<half>(wide);
      rounded.set(start + d, near);
      const float left = wide - widen(near);
      lost = fma(left, left, lost);
    }
  }
  const float norm = sqrt(warp_total(total));
  const float inverse = norm > 0 ? 1.0f / norm : 0.0f;
  if constexpr (ROUNDS) lost = warp_total(lost);
  if (lane == 0) {
    inverse_norm.set(row, broken ? not_a_number() : inverse);
    // from above: the rest bounds the rounding of sums of up to 2^13 squares, and of what is made of them
    if constexpr (ROUNDS) residual.set(row, broken ? 0.0f : sqrt(lost) * inverse * (1.0f + 0x1p-10f));
  }
}

}  // namespace drseg::cuda
