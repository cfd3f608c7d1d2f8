// SPDX-License-Identifier: Apache-2.0
#include "cpu/coarse.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/level.h"
#include "cpu/vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace drseg {
namespace {

// Four steps of 2 * 62 * 63 fit into 16 bits.
constexpr int kRowLimit = 31, kColumnLimit = 63;
constexpr int64_t kChunk = 128;
constexpr int64_t kRows = 8;

// Channels this far apart at least are mixed: as many as a vector holds pass side by side.
constexpr int64_t kNearest = 16;

// Random signs, then a Hadamard transform of each stretch of `size` channels, over those kNearest apart: orthonormal.
DRSEG_INLINE void turn(float* value, const float* sign, int64_t width, int64_t size) {
  const float scale = 1 / std::sqrt(static_cast<float>(size / kNearest));
  for (int64_t d = 0; d < width; ++d) value[d] *= sign[d] * scale;
  for (int64_t start = 0; start < width; start += size)
    for (int64_t half = kNearest; half < size; half *= 2)
      for (int64_t pair = start; pair < start + size; pair += 2 * half)
        for (int64_t d = pair; d < pair + half; ++d) {
          const float a = value[d], b = value[d + half];
          value[d] = a + b;
          value[d + half] = a - b;
        }
}

// Whole multiples of a step, the step, and the length of what they leave.
template <int kBytes, class Q>
DRSEG_INLINE void quantise(
    const float* value, int64_t width, float limit, int offset, Q* out, float* step, float* rest, int32_t* sum) {
  typedef Register<float, kBytes> R;
  const typename R::type zero = {};
  typename R::type most = zero;
  for (int64_t d = 0; d < width; d += R::lanes) {
    const auto x = R::load(value + d), size = x < zero ? -x : x;
    most = size > most ? size : most;
  }
  float largest = 0;
  for (int l = 0; l < R::lanes; ++l) largest = std::max(largest, most[l]);
  *step = largest / limit;
  const float inverse = largest > 0 ? limit / largest : 0;
  // the sum with this number has the nearest whole one in its low bits
  constexpr float shift = 12582912.f;
  typename R::type left = zero, total = zero;
  for (int64_t start = 0; start < width; start += R::lanes) {
    const auto x = R::load(value + start);
    auto level = (x * inverse + shift) - shift;
    // a row that is not finite may hold anything: its factors are NaN
    level = level >= zero - limit ? (level <= zero + limit ? level : zero) : zero;
    const auto difference = x - *step * level;
    left += difference * difference;
    total += level;
    float whole[R::lanes];
    R::store(whole, level);
    for (int l = 0; l < R::lanes; ++l) out[start + l] = static_cast<Q>(static_cast<int>(whole[l]) + offset);
  }
  *rest = std::sqrt(R::sum(left)) * (1 + 1e-3f);
  *sum = static_cast<int32_t>(R::sum(total));
}

template <class T, int kBytes>
DRSEG_INLINE void reduce_rows(
    Coarse* coarse, const T* value, int64_t stride, int64_t channels, const T* inverse, int64_t first, int64_t count) {
  const int64_t width = coarse->width;
  std::vector<float> turned(width);
  for (int64_t p = first; p < first + count; ++p) {
    const float* from = value + (p - first) * stride;
    const float factor = inverse[p - first];
    std::copy_n(from, channels, turned.begin());
    std::fill(turned.begin() + channels, turned.end(), 0.f);
    turn(turned.data(), coarse->sign.data(), width, coarse->mixed);
    typename Register<float, kBytes>::type squares = {};
    for (int64_t d = 0; d < width; d += Register<float, kBytes>::lanes) {
      const auto x = Register<float, kBytes>::load(turned.data() + d);
      squares += x * x;
    }
    coarse->length[p] = std::sqrt(Register<float, kBytes>::sum(squares)) * (1 + 1e-4f) * factor;
    Coarse::Side &rows = coarse->rows, &columns = coarse->columns;
    int32_t sum;
    quantise<kBytes>(
        turned.data(), width, kRowLimit, kRowLimit, coarse->row.get() + p * width, &rows.step[p], &rows.rest[p], &sum);
    quantise<kBytes>(
        turned.data(), width, kColumnLimit, 0, coarse->column.get() + p * width, &columns.step[p], &columns.rest[p],
        &sum);
    coarse->shift[p] = kRowLimit * sum;
    for (Coarse::Side* side : {&rows, &columns}) {
      side->step[p] *= factor;
      side->rest[p] *= factor;
    }
  }
}

DRSEG_LEVELS(reduce_floats, reduce_rows)

#if defined(__x86_64__)
// Products of kRows rows with one column.
__attribute__((target("avx2"))) void products(
    const uint8_t* const* row, const int8_t* column, int64_t width, int32_t* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = _mm256_setzero_si256();
  for (int64_t d = 0; d < width; d += kChunk) {
    __m256i b[4];
    for (int n = 0; n < 4; ++n) b[n] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column + d + 32 * n));
    for (int r = 0; r < kRows; ++r) {
      const __m256i* a = reinterpret_cast<const __m256i*>(row[r] + d);
      __m256i part = _mm256_maddubs_epi16(_mm256_loadu_si256(a), b[0]);
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(_mm256_loadu_si256(a + 1), b[1]));
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(_mm256_loadu_si256(a + 2), b[2]));
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(_mm256_loadu_si256(a + 3), b[3]));
      sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(part, ones));
    }
  }
  for (int half = 0; half < kRows; half += 4) {
    const __m256i low = _mm256_hadd_epi32(sum[half], sum[half + 1]);
    const __m256i high = _mm256_hadd_epi32(sum[half + 2], sum[half + 3]);
    const __m256i all = _mm256_hadd_epi32(low, high);
    const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + half), total);
  }
}
#endif

}  // namespace

Coarse::Coarse(int64_t nodes, int64_t channels)
    : width((channels + kChunk - 1) / kChunk * kChunk),
      mixed(width & -width),
      slack(static_cast<float>(width + 8) * 4 * std::numeric_limits<float>::epsilon()),
      row(std::make_unique_for_overwrite<uint8_t[]>(nodes * width)),
      column(std::make_unique_for_overwrite<int8_t[]>(nodes * width)),
      length(nodes),
      sign(width),
      shift(nodes) {
  for (Side* side : {&rows, &columns}) {
    side->step.resize(nodes);
    side->rest.resize(nodes);
  }
  uint32_t random = 12345;
  for (float& value : sign) {
    random = random * 1664525u + 1013904223u;
    value = random >> 31 ? -1.f : 1.f;
  }
}

bool Coarse::available() { return level() != Level::plain; }

void Coarse::reduce(
    const float* value, int64_t stride, int64_t channels, const float* inverse, int64_t first, int64_t count) {
  DRSEG_CALL(reduce_floats, float, this, value, stride, channels, inverse, first, count);
}

void Coarse::bounds(
    const int64_t* position, int64_t count, int64_t first, int64_t across, float* upper, int64_t stride) const {
#if defined(__x86_64__)
  for (int64_t n = 0; n < count; n += kRows) {
    const uint8_t* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) from[r] = row.get() + position[std::min(n + r, count - 1)] * width;
    const int64_t present = std::min(kRows, count - n);
    for (int64_t c = 0; c < across; ++c) {
      const int64_t p = first + c;
      int32_t product[kRows];
      products(from, column.get() + p * width, width, product);
      // rounding of the few operations here is far below the slack
      for (int64_t r = 0; r < present; ++r)
        upper[(n + r) * stride + c] = static_cast<float>(product[r] - shift[p]);
    }
    for (int64_t r = 0; r < present; ++r) {
      const int64_t own = position[n + r];
      const float step = rows.step[own], rest = rows.rest[own], size = length[own];
      float* out = upper + (n + r) * stride;
      for (int64_t c = 0; c < across; ++c) {
        const int64_t p = first + c;
        const float error = rest * (length[p] + columns.rest[p]) + size * (columns.rest[p] + slack * length[p]);
        out[c] = out[c] * (step * columns.step[p]) + error;
      }
    }
  }
#endif
}

}  // namespace drseg
