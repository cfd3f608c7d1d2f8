// SPDX-License-Identifier: Apache-2.0
// Rows in a few bits with certified bounds: which cosines can reach a threshold, at a fraction of the cost of knowing
// them.
//
// A row x, turned by a random rotation so that no channel stands out, is step * q + rest with whole q. Then
//   | <x, y> - step_x step_y <q_x, q_y> |  <=  |rest_x| (|y| + |rest_y|) + |x| |rest_y|.
// What the bounds let pass is computed in full precision; they never decide on a neighbour.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace drseg {

// All factors include the inverse norms, so that the bounds are those of cosines.
struct Coarse {
  // More channels would overflow the sums of products.
  static constexpr int64_t kMostChannels = 65536;
  // Rows that bounds() takes at once.
  static constexpr int64_t kMostRows = 24;
  // Columns that lie together: what the first cache level holds while rows pass by.
  static constexpr int64_t kTogether = 32;

  int64_t width;  // bytes of a row, a multiple of 128
  int64_t mixed;  // channels in which the rotation mixes, a power of two
  int limit;      // of the whole numbers: what the products of this CPU can hold
  float slack;    // for the float32 sums, relative to the norms
  std::unique_ptr<int8_t[]> row;      // (N, width) by position
  std::unique_ptr<uint8_t[]> column;  // (blocks, kBlock / kTogether, width / 4, kTogether, 4), offset by the limit
  std::vector<float> step, rest, length;  // by position; length is |x|, rounded up
  std::vector<int32_t> shift;             // what the columns' offset adds to a product with this row
  std::vector<float> sign;                // of each channel in the rotation

  Coarse(int64_t nodes, int64_t blocks, int64_t channels);

  // Whether this CPU has the instructions.
  static bool available();

  // Reduces `count` rows of `channels` floats, the `block`-th block of columns, to the positions from `first` on.
  void reduce(
      const float* const* value, int64_t channels, const float* inverse, int64_t block, int64_t first, int64_t count);

  // Bounds of the cosines of up to kMostRows positions with a block of columns whose first position is `first`, as
  // [n * kBlock + c]; NaN where an inverse norm is.
  void bounds(
      const int64_t* position, int64_t count, int64_t block, int64_t first, float* upper,
      float* lower) const;
};

}  // namespace drseg
