// SPDX-License-Identifier: Apache-2.0
// Rows scaled by exact powers of two, or as they are, and the inverse of their norms: one pass over the features.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "check.h"
#include "cpu/level.h"
#include "ops.h"

namespace drseg {
namespace {

template <class T, int kBytes>
DRSEG_INLINE void prepare_rows(
    const T* prior, T* scaled, T* inverse, bool scales, int64_t channels, int64_t first, int64_t last) {
  constexpr int64_t lanes = 4 * kBytes / sizeof(T);
  constexpr T largest = std::numeric_limits<T>::max();
  // the exponent of a subnormal number is lower still, and its inverse would overflow
  constexpr int limit = sizeof(T) == 8 ? 1020 : 126;
  for (int64_t row = first; row < last; ++row) {
    const T* in = prior + row * channels;
    T* out = scaled + row * channels;
    T most[lanes] = {};
    int bad[lanes] = {};
    int64_t d = 0;
    for (; d + lanes <= channels; d += lanes)
      for (int64_t l = 0; l < lanes; ++l) {
        const T size = std::abs(in[d + l]);
        most[l] = size > most[l] ? size : most[l];
        bad[l] |= !(size <= largest);
      }
    for (int64_t l = 0; d < channels; ++d, ++l) {
      const T size = std::abs(in[d]);
      most[l] = size > most[l] ? size : most[l];
      bad[l] |= !(size <= largest);
    }
    const bool finite = *std::max_element(bad, bad + lanes) == 0;
    // as the reference scales a row that is not finite
    int exponent = scales ? 1 : 0;
    if (finite && scales) std::frexp(*std::max_element(most, most + lanes), &exponent);
    const T scale = std::ldexp(T(1), -std::clamp(exponent, -limit, limit));
    T sum[lanes] = {};
    d = 0;
    for (; d + lanes <= channels; d += lanes)
      for (int64_t l = 0; l < lanes; ++l) {
        const T value = in[d + l] * scale;
        out[d + l] = value;
        sum[l] += value * value;
      }
    for (int64_t l = 0; d < channels; ++d, ++l) {
      const T value = in[d] * scale;
      out[d] = value;
      sum[l] += value * value;
    }
    for (int64_t half = lanes / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
    const T norm = std::sqrt(sum[0]);
    inverse[row] = !finite ? std::numeric_limits<T>::quiet_NaN() : (norm > 0 ? 1 / norm : T(0));
  }
}

DRSEG_LEVELS(prepare, prepare_rows)

template <class T>
void run(const Tensor& prior, bool scales, Tensor& scaled, Tensor& inverse) {
  const int64_t channels = prior.size(2);
  const T* in = prior.const_data_ptr<T>();
  T *out = scaled.mutable_data_ptr<T>(), *norm = inverse.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / channels);
  torch::stable::parallel_for(0, prior.size(0) * prior.size(1), grain, [&](int64_t first, int64_t last) {
    DRSEG_CALL(prepare, T, in, out, norm, scales, channels, first, last);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> prepare_prior(const Tensor& prior, bool scale) {
  constexpr const char* op = "drseg_native::prepare_prior";
  const ScalarType dtype = check_floating(op, prior);
  check_operand(op, "prior", prior, 3, dtype);
  Tensor scaled = drseg::allocate_like(prior);
  Tensor inverse = drseg::allocate(prior, {prior.size(0), prior.size(1)});
  if (scaled.numel() == 0) return {scaled, torch::stable::fill_(inverse, 0)};
  if (dtype == ScalarType::Double) {
    run<double>(prior, scale, scaled, inverse);
  } else {
    run<float>(prior, scale, scaled, inverse);
  }
  return {scaled, inverse};
}

}  // namespace drseg
