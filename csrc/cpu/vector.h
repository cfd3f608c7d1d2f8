// SPDX-License-Identifier: Apache-2.0
// Vector registers of the width that a level has, as the compiler's own vector types.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/level.h"

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DRSEG_SHUFFLE 1
#endif
#endif

namespace drseg {

// A value as it is stored: the compiler must not fuse the product it comes from with what follows.
template <class V>
DRSEG_INLINE V rounded(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

template <class T, int kBytes>
struct Register {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kBytes)));
  typedef T unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));

  DRSEG_INLINE static type load(const T* from) { return *reinterpret_cast<const unaligned*>(from); }
  DRSEG_INLINE static void store(T* to, type value) { *reinterpret_cast<unaligned*>(to) = value; }

  // Lanes added in halves: the first half to the second, and so on. Always in this order.
  DRSEG_INLINE static T sum(type value) {
    T lane[lanes];
    store(lane, value);
    for (int half = lanes / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }

  // The sums of four registers, each the same bits as sum() gives.
  DRSEG_INLINE static void four_sums(type a, type b, type c, type d, T* out) {
#ifdef DRSEG_SHUFFLE
    if constexpr (lanes >= 4) {
      type all = halve<4>(halve<2>(a, b), halve<2>(c, d));
      for_segments<lanes / 4>(all);
      for (int n = 0; n < 4; ++n) out[n] = all[n * (lanes / 4)];
      return;
    }
#endif
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }

#ifdef DRSEG_SHUFFLE
 private:
  // Two registers in kCount / 2 segments each become one in kCount segments, each folded to half its length.
  template <int kCount>
  DRSEG_INLINE static type halve(type a, type b) {
    return halve<kCount>(a, b, std::make_integer_sequence<int, lanes>());
  }

  template <int kCount, int... kLane>
  DRSEG_INLINE static type halve(type a, type b, std::integer_sequence<int, kLane...>) {
    constexpr int part = lanes / kCount;
    return __builtin_shufflevector(a, b, (kLane / part * 2 * part + kLane % part)...) +
           __builtin_shufflevector(a, b, (kLane / part * 2 * part + kLane % part + part)...);
  }

  template <int kLength>
  DRSEG_INLINE static void for_segments(type& value) {
    if constexpr (kLength > 1) {
      value = fold<kLength / 2>(value, std::make_integer_sequence<int, lanes>());
      for_segments<kLength / 2>(value);
    }
  }

  template <int kHalf, int... kLane>
  DRSEG_INLINE static type fold(type value, std::integer_sequence<int, kLane...>) {
    return value + __builtin_shufflevector(value, value, (kLane ^ kHalf)...);
  }
#endif
};

}  // namespace drseg
