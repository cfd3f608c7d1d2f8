// SPDX-License-Identifier: Apache-2.0
// What every search of knn_graph shares: the question, the features in rows, a row's scores and its answer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/dot_tile.h"
#include "cpu/grid.h"
#include "cpu/level.h"
#include "cpu/vector.h"

namespace drseg {

enum Form : int64_t { kAdditive, kGauss, kMultiplicative, kProduct };

template <class T>
DRSEG_INLINE T join(T cosine, T decay, bool subtract, bool clamp) {
  if (subtract) return cosine - decay;
  return (clamp && cosine < T(0) ? T(0) : cosine) * decay;
}

template <class T>
struct Problem {
  const Grid& grid;
  const Decay<T>& decay;
  int64_t channels, k;
  bool subtract, clamp, include_self;
  int64_t first, last;  // the nodes whose neighbours are wanted: the rows of the result

  // neighbours to be chosen beside the node itself
  int64_t others() const { return k - (include_self && k > 0 ? 1 : 0); }

  bool wants(int64_t node) const { return first <= node && node < last; }

  bool wants(const Block& block) const {
    const int32_t* node = grid.node.data() + block.first;
    return std::any_of(node, node + block.count, [this](int32_t n) { return wants(int64_t(n)); });
  }
};

// The features of one image by position, in rows that dot_block() can take.
template <class T>
struct Rows {
  std::unique_ptr<T[]> memory;
  T* copy;  // nullptr where the features are read where they lie
  const T* value;
  const int32_t* place;    // of each position's row; nullptr where rows lie by position
  std::vector<T> inverse;  // inverse norms, by position
  int64_t stride, width;

  static bool can_view(int64_t channels) { return channels == padded_width<T>(channels); }

  // Features of full vectors need no copy.
  static Rows view(const Problem<T>& problem, const T* prior) {
    return {nullptr, nullptr, prior, problem.grid.node.data(), std::vector<T>(problem.grid.nodes()), problem.channels,
            problem.channels};
  }

  // Room for a copy, which copy_rows() makes.
  static Rows room(int64_t nodes, int64_t channels) {
    const int64_t stride = row_stride<T>(channels), unit = kRowUnit / sizeof(T);
    auto memory = std::make_unique_for_overwrite<T[]>(nodes * stride + unit);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    T* copy = memory.get() + (kRowUnit - address % kRowUnit) % kRowUnit / sizeof(T);
    return {std::move(memory), copy, copy, nullptr, std::vector<T>(nodes), stride, padded_width<T>(channels)};
  }

  const T* at(int64_t position) const { return value + (place == nullptr ? position : place[position]) * stride; }

  void list(int64_t first, int64_t count, const T** row) const {
    for (int64_t n = 0; n < count; ++n) row[n] = at(first + n);
  }
};

// Brings in the rows of some positions: their inverse norms, and where there is room for a copy, their features.
template <class T>
void copy_rows(const Problem<T>& problem, const T* prior, const T* inverse, Rows<T>& rows, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t node = problem.grid.node[p];
    rows.inverse[p] = inverse[node];
    if (rows.copy == nullptr) continue;
    T* row = rows.copy + p * rows.stride;
    std::copy_n(prior + node * problem.channels, problem.channels, row);
    std::fill(row + problem.channels, row + rows.stride, T(0));
  }
}

// Scores of one row with some others: NaN where either node is not finite. All scores are made here, and a product is
// rounded before anything is subtracted from it. So equal dots and decays give equal scores wherever they are computed.
// A fused multiply-subtract in one place and none in another would order ties.
template <class T, int kBytes>
DRSEG_INLINE void finish_scores(
    const Problem<T>& problem, T own, const T* inverse, const T* dot, const T* decay, int64_t count, T* score) {
  typedef Register<T, kBytes> R;
  if (!problem.subtract) {
    for (int64_t c = 0; c < count; ++c) score[c] = join(dot[c] * own * inverse[c], decay[c], false, problem.clamp);
    return;
  }
  int64_t c = 0;
  for (; c + R::lanes <= count; c += R::lanes)
    R::store(score + c, rounded(R::load(dot + c) * own * R::load(inverse + c)) - R::load(decay + c));
  for (; c < count; ++c) score[c] = rounded(dot[c] * own * inverse[c]) - decay[c];
}

template <class T, int kBytes>
DRSEG_INLINE void finish_row(
    const Problem<T>& problem, const Rows<T>& rows, int64_t p, const Block& columns, const T* dot, T* score) {
  const int64_t node = problem.grid.node[p];
  T decay[kBlock];
  decay_of_block(problem.decay, columns, node / problem.grid.width, node % problem.grid.width, decay);
  finish_scores<T, kBytes>(
      problem, rows.inverse[p], rows.inverse.data() + columns.first, dot, decay, columns.count, score);
}

// The row's answer from the chosen others in ascending node order.
template <class T>
void write_row(
    const Problem<T>& problem, int64_t node, bool finite, T own_score, const int32_t* chosen, const T* score,
    int64_t count, int32_t* index, T* out) {
  int64_t slot = 0, n = 0;
  bool pending = problem.include_self && problem.k > 0;
  if (finite) {
    while (n < count || pending) {
      if (pending && (n == count || chosen[n] > node)) {
        index[slot] = static_cast<int32_t>(node);
        out[slot++] = own_score;
        pending = false;
      } else {
        index[slot] = chosen[n];
        out[slot++] = score[n++];
      }
    }
  }
  for (; slot < problem.k; ++slot) {
    index[slot] = static_cast<int32_t>(node);
    out[slot] = finite ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN();
  }
}

}  // namespace drseg
