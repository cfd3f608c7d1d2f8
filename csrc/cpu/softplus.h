// SPDX-License-Identifier: Apache-2.0
// log(1 + exp(x)) and its slope, accurate relative to their values, without branches so that loops become vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/level.h"

namespace drseg {

// exp(-a) for a of -89 to 104, from infinity over the subnormal numbers to zero; NaN passes.
DRSEG_INLINE float exp_minus(float a) {
  // the nearest integer appears in the low bits of a sum of this size, whatever `a` is
  constexpr float shift = 12582912.f;
  const float sum = a * -1.44269504f + shift;
  const float n = sum - shift;
  int32_t bits, zero;
  std::memcpy(&bits, &sum, sizeof(bits));
  std::memcpy(&zero, &shift, sizeof(zero));
  const uint32_t exponent = static_cast<uint32_t>(bits) - static_cast<uint32_t>(zero);
  const float r = (-a - n * 0.693145752f) - n * 1.42860677e-6f;
  float value = 1.f / 5040;
  value = value * r + 1.f / 720;
  value = value * r + 1.f / 120;
  value = value * r + 1.f / 24;
  value = value * r + 1.f / 6;
  value = value * r + 0.5f;
  value = value * r + 1.f;
  value = value * r + 1.f;
  // 2**n in two steps, each in range
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(exponent) >> 1);
  const uint32_t first_bits = (half + 127) << 23, second_bits = (exponent - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, sizeof(first));
  std::memcpy(&second, &second_bits, sizeof(second));
  return value * first * second;
}

// exp(-a) for a >= 0.
DRSEG_INLINE float exp_negative(float a) { return exp_minus(a > 104.f ? 104.f : a); }

// exp(x) for every x.
DRSEG_INLINE float exp_of(float x) {
  x = x > 89.f ? 89.f : x;
  return exp_minus(x < -104.f ? 104.f : -x);
}

DRSEG_INLINE double exp_of(double x) { return std::exp(x); }

DRSEG_INLINE float softplus_of(float x) {
  const float e = exp_negative(std::fabs(x));
  // log(1 + e) = 2 artanh(e / (2 + e))
  const float z = e / (2 + e), s = z * z;
  float series = 1.f / 15;
  series = series * s + 1.f / 13;
  series = series * s + 1.f / 11;
  series = series * s + 1.f / 9;
  series = series * s + 1.f / 7;
  series = series * s + 1.f / 5;
  series = series * s + 1.f / 3;
  series = series * s + 1.f;
  return (x < 0 ? 0.f : x) + 2 * z * series;
}

DRSEG_INLINE double softplus_of(double x) { return (x < 0 ? 0. : x) + std::log1p(std::exp(-std::fabs(x))); }

// 1 - exp(-w) for w >= 0, which is the slope of softplus where its value is w.
DRSEG_INLINE float slope_of_value(float w) {
  float series = -1.f / 40320;
  series = series * w + 1.f / 5040;
  series = series * w - 1.f / 720;
  series = series * w + 1.f / 120;
  series = series * w - 1.f / 24;
  series = series * w + 1.f / 6;
  series = series * w - 0.5f;
  series = series * w + 1.f;
  const float large = 1 - exp_negative(w);
  return w < 0.5f ? w * series : large;
}

DRSEG_INLINE double slope_of_value(double w) { return -std::expm1(-w); }

template <class T>
DRSEG_INLINE void softplus(T* value, int64_t count) {
  for (int64_t n = 0; n < count; ++n) value[n] = softplus_of(value[n]);
}

template <class T>
DRSEG_INLINE void softplus_slope(const T* grad, const T* weight, T* slope, int64_t count) {
  for (int64_t n = 0; n < count; ++n) slope[n] = grad[n] * slope_of_value(weight[n]);
}

// The same for weights that are softplus times exp(exponent). A weight of zero has no slope, whatever its exponent is.
template <class T>
DRSEG_INLINE void scaled_slope(const T* grad, const T* weight, const T* exponent, T* slope, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    const T factor = exp_of(exponent[n]), value = factor * slope_of_value(weight[n] / factor);
    slope[n] = grad[n] * (weight[n] == 0 ? T(0) : value);
  }
}

}  // namespace drseg
