// SPDX-License-Identifier: Apache-2.0
// Rows in a few bits with a certified bound: which cosines can reach a threshold, at a third of the cost of knowing them.
//
// A row x, turned by a random rotation so that no channel stands out, is step * q + rest with whole q. Then
//   <x, y> <= step_x step_y <q_x, q_y> + |rest_x| (|y| + |rest_y|) + |x| |rest_y|.
// What the bound lets pass is computed in full precision; it never decides on a neighbour.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace drseg {

// All factors include the inverse norms, so that the bound is one of cosines.
struct Coarse {
  // Of each position as a row (6 bits) or as a column (7 bits).
  struct Side {
    std::vector<float> step, rest;
  };

  int64_t width;  // bytes of a row, a multiple of 128
  int64_t mixed;  // channels in which the rotation mixes, a power of two
  float slack;    // for the float32 sums, relative to the norms
  std::unique_ptr<uint8_t[]> row;
  std::unique_ptr<int8_t[]> column;
  Side rows, columns;
  std::vector<float> length;   // |x|
  std::vector<float> sign;     // of each channel in the rotation
  std::vector<int32_t> shift;  // what the rows' offset adds to a product with this column

  Coarse(int64_t nodes, int64_t channels);

  // Whether this CPU has the instructions.
  static bool available();

  // Reduces `count` rows of `channels` floats, `stride` apart, to the positions from `first` on.
  void reduce(const float* value, int64_t stride, int64_t channels, const float* inverse, int64_t first, int64_t count);

  // upper[n][c]: bound of the cosine of position[n] with position first + c. Rows of `upper` are `stride` apart; NaN
  // where an inverse norm is.
  void bounds(
      const int64_t* position, int64_t count, int64_t first, int64_t columns, float* upper, int64_t stride) const;
};

}  // namespace drseg
