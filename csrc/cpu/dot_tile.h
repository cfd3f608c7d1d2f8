// SPDX-License-Identifier: Apache-2.0
// Dot products of every row of one block with every row of another.
//
// A dot product is summed by lane along the row and folded in a fixed order. So its bits depend only on its two rows:
// not on the block, not on the place in it, and not on which of the two comes first. Equal rows have equal scores.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/level.h"
#include "cpu/vector.h"

namespace drseg {

// Rows are padded with zeros to a multiple of this many bytes. A row takes one such unit more than it needs, because
// rows a power of two apart would share their cache sets.
constexpr int64_t kRowUnit = 64;

template <class T>
int64_t padded_width(int64_t width) {
  constexpr int64_t lanes = kRowUnit / sizeof(T);
  return (width + lanes - 1) / lanes * lanes;
}

template <class T>
int64_t row_stride(int64_t width) {
  return padded_width<T>(width) + kRowUnit / static_cast<int64_t>(sizeof(T));
}

// kRows x kColumns dots in registers.
template <class T, int kBytes, int kRows, int kColumns>
DRSEG_INLINE void dots_in_registers(
    const T* const* left, const T* const* right, int64_t width, T* out, int64_t out_stride) {
  typedef Register<T, kBytes> R;
  typename R::type sum[kRows][kColumns] = {};
  const T *row[kRows], *column[kColumns];
  for (int r = 0; r < kRows; ++r) row[r] = left[r];
  for (int c = 0; c < kColumns; ++c) column[c] = right[c];
  for (int64_t d = 0; d < width; d += R::lanes) {
    typename R::type a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = R::load(row[r] + d);
    for (int c = 0; c < kColumns; ++c) {
      const auto b = R::load(column[c] + d);
      for (int r = 0; r < kRows; ++r) sum[r][c] += a[r] * b;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kColumns == 4) {
      R::four_sums(sum[r][0], sum[r][1], sum[r][2], sum[r][3], out + r * out_stride);
    } else {
      for (int c = 0; c < kColumns; ++c) out[r * out_stride + c] = R::sum(sum[r][c]);
    }
  }
}

template <class T, int kBytes, int kColumns>
DRSEG_INLINE void dots_of_columns(
    const T* const* left, int64_t rows, const T* const* right, int64_t width, T* out, int64_t out_stride) {
  // as many sums as there are registers for: 32 in AVX-512, otherwise 16
  constexpr int kRows = kBytes == 64 ? 6 : 3;
  if (rows < kRows) {
    for (int64_t r = 0; r < rows; ++r)
      dots_in_registers<T, kBytes, 1, kColumns>(left + r, right, width, out + r * out_stride, out_stride);
    return;
  }
  for (int64_t r = 0; r < rows; r += kRows) {
    // the last rows overlap the ones before: the same bits are written twice
    const int64_t start = std::min(r, rows - kRows);
    dots_in_registers<T, kBytes, kRows, kColumns>(left + start, right, width, out + start * out_stride, out_stride);
  }
}

// out[r][c] = <left_r, right_c>; `width` is padded. A few columns stay in the first cache level while the rows pass by.
template <class T, int kBytes>
DRSEG_INLINE void dot_block(
    const T* const* left, int64_t rows, const T* const* right, int64_t columns, int64_t width, T* out,
    int64_t out_stride) {
  constexpr int kColumns = 4;
  if (columns < kColumns) {
    for (int64_t c = 0; c < columns; ++c)
      dots_of_columns<T, kBytes, 1>(left, rows, right + c, width, out + c, out_stride);
    return;
  }
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t start = std::min(c, columns - kColumns);
    dots_of_columns<T, kBytes, kColumns>(left, rows, right + start, width, out + start, out_stride);
  }
}

}  // namespace drseg
