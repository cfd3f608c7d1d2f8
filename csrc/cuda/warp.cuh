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
// A neighbour within the image, as every backend takes it.
DRSEG_DEVICE int clamped(int node, int nodes) { return node < 0 ? 0 : node >= nodes ? nodes - 1 : node; }

// 16 bytes of a row.
template <class T>
struct alignas(16) Piece {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};
// The same in float32. Of two bfloat16 in one word, each is a float32 after one instruction.
template <class T>
DRSEG_DEVICE void widen_piece(const Piece<T>& piece, float (&to)[Piece<T>::SIZE]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    struct Words {
      uint32_t word[4];
    };
    const Words words = __builtin_bit_cast(Words, piece);
    DRSEG_UNROLL
    for (int n = 0; n < 4; ++n) {
      to[2 * n] = float_of(int(words.word[n] << 16));
      to[2 * n + 1] = float_of(int(words.word[n] & 0xffff0000u));
    }
  } else {
    DRSEG_UNROLL
    for (int n = 0; n < Piece<T>::SIZE; ++n) to[n] = widen(piece.value[n]);
  }
}

// Numbers of a layer, which may be wider than its rows.
struct Parameter {
  Global<const float> single;
  Global<const bfloat16> half;
  bool is_half;
  DRSEG_DEVICE float get(int64_t i) const { return is_half ? widen(half.get(i)) : single.get(i); }
};

// A tree over the lanes, in one order; every lane has the result.
DRSEG_DEVICE float warp_total(float value) {
  DRSEG_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
// Of numbers that are not negative, whose bits order as they do.
DRSEG_DEVICE float warp_largest(float value) { return float_of(warp_max(bits_of(value))); }

}  // namespace drseg::cuda
