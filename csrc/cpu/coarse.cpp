// SPDX-License-Identifier: Apache-2.0
#include "cpu/coarse.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/grid.h"
#include "cpu/level.h"
#include "cpu/vector.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace drseg {
namespace {

constexpr int64_t kUnit = 128;
constexpr int64_t kTogether = Coarse::kTogether;

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

// Whole multiples of a step, the step, the length of what they leave, and their sum.
template <int kBytes>
DRSEG_INLINE void quantise(
    const float* value, int64_t width, float limit, int8_t* out, float* step, float* rest, int32_t* sum) {
  typedef Register<float, kBytes> R;
  typedef Register<int32_t, kBytes> I;
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
  for (int64_t d = 0; d < width; d += R::lanes) {
    const auto x = R::load(value + d);
    auto level = (x * inverse + shift) - shift;
    // a row that is not finite may hold anything: its factors are NaN
    level = level >= zero - limit ? (level <= zero + limit ? level : zero) : zero;
    const auto difference = x - *step * level;
    left += difference * difference;
    total += level;
    int32_t whole[I::lanes];
    I::store(whole, reinterpret_cast<typename I::type>(level + shift));
    for (int l = 0; l < I::lanes; ++l) out[d + l] = static_cast<int8_t>(whole[l]);
  }
  *rest = std::sqrt(R::sum(left)) * (1 + 1e-3f);
  *sum = static_cast<int32_t>(R::sum(total));
}

template <class T, int kBytes>
DRSEG_INLINE void reduce_rows(
    Coarse* coarse, const T* const* value, int64_t channels, const T* inverse, int64_t block, int64_t first,
    int64_t count) {
  const int64_t width = coarse->width;
  const uint8_t offset = static_cast<uint8_t>(coarse->limit);
  uint8_t* packed = coarse->column.get() + block * kBlock * width;
  std::vector<float> turned(width);
  std::vector<uint8_t> bytes(width);
  if (count < kBlock) std::fill_n(packed, kBlock * width, offset);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t p = first + n;
    const float factor = inverse[n];
    std::copy_n(value[n], channels, turned.begin());
    std::fill(turned.begin() + channels, turned.end(), 0.f);
    turn(turned.data(), coarse->sign.data(), width, coarse->mixed);
    typename Register<float, kBytes>::type squares = {};
    for (int64_t d = 0; d < width; d += Register<float, kBytes>::lanes) {
      const auto x = Register<float, kBytes>::load(turned.data() + d);
      squares += x * x;
    }
    coarse->length[p] = std::sqrt(Register<float, kBytes>::sum(squares)) * (1 + coarse->slack) * factor;
    int8_t* row = coarse->row.get() + p * width;
    float step, rest;
    int32_t sum;
    quantise<kBytes>(turned.data(), width, static_cast<float>(coarse->limit), row, &step, &rest, &sum);
    coarse->step[p] = step * factor;
    coarse->rest[p] = rest * factor;
    coarse->shift[p] = coarse->limit * sum;
    for (int64_t d = 0; d < width; ++d) bytes[d] = static_cast<uint8_t>(row[d]) + offset;
    uint8_t* own = packed + n / kTogether * kTogether * width + n % kTogether * 4;
    for (int64_t d = 0; d < width; d += 4) std::memcpy(own + d * kTogether, bytes.data() + d, 4);
  }
}

DRSEG_LEVELS(reduce_floats, reduce_rows)

// What the products of a block leave to be done: scale, and the error on both sides.
template <class T, int kBytes>
DRSEG_INLINE void widen_products(
    const Coarse* coarse, const int64_t* position, int64_t count, int64_t first, const int32_t* product, T* upper,
    T* lower) {
  typedef Register<T, kBytes> R;
  typedef Register<int32_t, kBytes> I;
  const T* step = coarse->step.data() + first;
  const T* rest = coarse->rest.data() + first;
  const T* length = coarse->length.data() + first;
  for (int64_t c = 0; c < kBlock; c += R::lanes) {
    const auto own_step = R::load(step + c), own_rest = R::load(rest + c), own_length = R::load(length + c);
    const auto along = own_length + own_rest, across = own_rest + coarse->slack * own_length;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t p = position[n];
      const auto whole = I::load(product + n * kBlock + c) - coarse->shift[p];
      // rounding of the few operations here is far below the slack
      const auto value = __builtin_convertvector(whole, typename R::type) * (coarse->step[p] * own_step);
      const auto error = coarse->rest[p] * along + coarse->length[p] * across;
      R::store(upper + n * kBlock + c, value + error);
      R::store(lower + n * kBlock + c, value - error);
    }
  }
}

DRSEG_LEVELS(widen, widen_products)

#if defined(__x86_64__)
enum class Products { madd, vnni256, vnni512 };

Products detect_products() {
  if (level() == Level::avx512 && __builtin_cpu_supports("avx512vnni")) return Products::vnni512;
  if (level() == Level::avx2 && __builtin_cpu_supports("avxvnni") && !forced_level("avx2")) return Products::vnni256;
  return Products::madd;
}

Products products() {
  static const Products value = detect_products();
  return value;
}

// Four steps of 2 * 90 * 45 fit into the 16 bits between maddubs and madd.
int most_level() { return products() == Products::madd ? 45 : 127; }

// Four channels of a row in every lane.
__attribute__((target("avx2"))) inline __m256i spread(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Products of kRows rows with kTogether columns, written to rows kBlock apart.
template <int kRows>
__attribute__((target("avx2"))) inline void products_madd(
    const int8_t* const* row, const uint8_t* column, int64_t width, int32_t* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t c = 0; c < kTogether; c += 16) {
    __m256i sum[kRows][2];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) sum[r][v] = _mm256_setzero_si256();
    for (int64_t d = 0; d < width; d += 16) {
      __m256i part[kRows][2];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) part[r][v] = _mm256_setzero_si256();
      for (int64_t q = d; q < d + 16; q += 4) {
        const __m256i* at = reinterpret_cast<const __m256i*>(column + q * kTogether + 4 * c);
        const __m256i near = _mm256_loadu_si256(at), far = _mm256_loadu_si256(at + 1);
        for (int r = 0; r < kRows; ++r) {
          const __m256i four = spread(row[r] + q);
          part[r][0] = _mm256_add_epi16(part[r][0], _mm256_maddubs_epi16(near, four));
          part[r][1] = _mm256_add_epi16(part[r][1], _mm256_maddubs_epi16(far, four));
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(part[r][v], ones));
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kBlock + c + 8 * v), sum[r][v]);
  }
}

template <int kRows>
__attribute__((target("avx2,avxvnni"))) inline void products_vnni256(
    const int8_t* const* row, const uint8_t* column, int64_t width, int32_t* out) {
  constexpr int kVectors = kTogether / 8;
  __m256i sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm256_setzero_si256();
  for (int64_t d = 0; d < width; d += 4) {
    const __m256i* at = reinterpret_cast<const __m256i*>(column + d * kTogether);
    __m256i four[kRows];
    for (int r = 0; r < kRows; ++r) four[r] = spread(row[r] + d);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i block = _mm256_loadu_si256(at + v);
      for (int r = 0; r < kRows; ++r) sum[r][v] = _mm256_dpbusd_avx_epi32(sum[r][v], block, four[r]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kBlock + 8 * v), sum[r][v]);
}

template <int kRows>
__attribute__((target("avx512f,avx512vnni"))) inline void products_vnni512(
    const int8_t* const* row, const uint8_t* column, int64_t width, int32_t* out) {
  constexpr int kVectors = kTogether / 16;
  __m512i sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_si512();
  for (int64_t d = 0; d < width; d += 4) {
    __m512i block[kVectors];
    for (int v = 0; v < kVectors; ++v) block[v] = _mm512_loadu_si512(column + d * kTogether + 64 * v);
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, row[r] + d, sizeof(four));
      const __m512i value = _mm512_set1_epi32(four);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], block[v], value);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(out + r * kBlock + 16 * v, sum[r][v]);
}
#else
int most_level() { return 1; }
#endif

}  // namespace

Coarse::Coarse(int64_t nodes, int64_t blocks, int64_t channels)
    : width((channels + kUnit - 1) / kUnit * kUnit),
      mixed(width & -width),
      limit(most_level()),
      slack(static_cast<float>(width + 8) * 4 * std::numeric_limits<float>::epsilon()),
      row(std::make_unique_for_overwrite<int8_t[]>(nodes * width)),
      column(std::make_unique_for_overwrite<uint8_t[]>(blocks * kBlock * width)),
      // a block of columns is read whole
      step(nodes + kBlock),
      rest(nodes + kBlock),
      length(nodes + kBlock),
      shift(nodes),
      sign(width) {
  uint32_t random = 12345;
  for (float& value : sign) {
    random = random * 1664525u + 1013904223u;
    value = random >> 31 ? -1.f : 1.f;
  }
}

bool Coarse::available() { return level() != Level::plain; }

void Coarse::reduce(
    const float* const* value, int64_t channels, const float* inverse, int64_t block, int64_t first, int64_t count) {
  DRSEG_CALL(reduce_floats, float, this, value, channels, inverse, block, first, count);
}

void Coarse::bounds(
    const int64_t* position, int64_t count, int64_t block, int64_t first, float* upper, float* lower) const {
#if defined(__x86_64__)
  const uint8_t* packed = column.get() + block * kBlock * width;
  int32_t product[kMostRows * kBlock];
  const int8_t* from[kMostRows];
  for (int64_t n = 0; n < kMostRows; ++n) from[n] = row.get() + position[std::min(n, count - 1)] * width;
  for (int64_t c = 0; c < kBlock; c += kTogether) {
    const uint8_t* columns = packed + c * width;
    int32_t* out = product + c;
    // as many rows at a time as there are registers for
    switch (products()) {
      case Products::vnni512:
        for (int64_t n = 0; n < count; n += 8) products_vnni512<8>(from + n, columns, width, out + n * kBlock);
        break;
      case Products::vnni256:
        for (int64_t n = 0; n < count; n += 3) products_vnni256<3>(from + n, columns, width, out + n * kBlock);
        break;
      default:
        for (int64_t n = 0; n < count; n += 3) products_madd<3>(from + n, columns, width, out + n * kBlock);
    }
  }
  DRSEG_CALL(widen, float, this, position, count, first, product, upper, lower);
#endif
}

}  // namespace drseg
