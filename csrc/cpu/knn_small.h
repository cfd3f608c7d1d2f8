// SPDX-License-Identifier: Apache-2.0
// Small grids: the scores of one image fit into a small buffer; each pair is computed once and serves both its rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/dot_tile.h"
#include "cpu/grain.h"
#include "cpu/knn_rows.h"
#include "cpu/level.h"
#include "cpu/select.h"

namespace drseg {

// Largest N whose N x N scores are held at once: 4 MB in float32.
constexpr int64_t kSmallGrid = 1024;
// Memory for the scores of several small images.
constexpr int64_t kScoreBytes = 32 << 20;

template <class T>
struct SmallImage {
  Rows<T> rows;
  std::unique_ptr<T[]> score;  // (N, N), -inf where a node may not be chosen
  std::vector<T> own;          // score of each node with itself

  SmallImage(int64_t nodes, int64_t channels)
      : rows(Rows<T>::room(nodes, channels)), score(std::make_unique_for_overwrite<T[]>(nodes * nodes)), own(nodes) {}
};

template <class T>
DRSEG_INLINE void keep_scores(SmallImage<T>& image, int64_t p, const Block& columns, const T* score, int64_t nodes) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  T* out = image.score.get() + p * nodes + columns.first;
  for (int64_t c = 0; c < columns.count; ++c) out[c] = score[c] == score[c] ? score[c] : none;
  if (p >= columns.first && p < columns.first + columns.count) {
    image.own[p] = score[p - columns.first];
    out[p - columns.first] = none;
  }
}

// One pair of blocks gives the scores of the rows of both.
template <class T, int kBytes>
DRSEG_INLINE void score_pair(const Problem<T>& problem, SmallImage<T>& image, const Block& one, const Block& other) {
  const Rows<T>& rows = image.rows;
  const int64_t nodes = problem.grid.nodes();
  T dot[kBlock * kBlock], turned[kBlock * kBlock], score[kBlock];
  const T *row[kBlock], *column[kBlock];
  rows.list(one.first, one.count, row);
  rows.list(other.first, other.count, column);
  dot_block<T, kBytes>(row, one.count, column, other.count, rows.width, dot, kBlock);
  for (int64_t r = 0; r < one.count; ++r) {
    finish_row<T, kBytes>(problem, rows, one.first + r, other, dot + r * kBlock, score);
    keep_scores(image, one.first + r, other, score, nodes);
  }
  if (one.first == other.first) return;
  for (int64_t r = 0; r < one.count; ++r)
    for (int64_t c = 0; c < other.count; ++c) turned[c * kBlock + r] = dot[r * kBlock + c];
  for (int64_t c = 0; c < other.count; ++c) {
    finish_row<T, kBytes>(problem, rows, other.first + c, one, turned + c * kBlock, score);
    keep_scores(image, other.first + c, one, score, nodes);
  }
}

template <class T, int kBytes>
DRSEG_INLINE void score_pairs(
    const Problem<T>* problem, std::vector<SmallImage<T>>* images, const std::vector<std::pair<int32_t, int32_t>>* pairs,
    int64_t first, int64_t last) {
  const int64_t count = pairs->size();
  for (int64_t task = first; task < last; ++task) {
    const auto [one, other] = (*pairs)[task % count];
    score_pair<T, kBytes>(*problem, (*images)[task / count], problem->grid.blocks[one], problem->grid.blocks[other]);
  }
}

template <class T, int kBytes>
DRSEG_INLINE void select_rows(
    const Problem<T>* problem, const std::vector<SmallImage<T>>* images, int32_t* index, T* out, int64_t first,
    int64_t last) {
  const int64_t nodes = problem->grid.nodes(), k = problem->k, wanted = problem->last - problem->first;
  Selection<T> work(nodes, k);
  std::vector<T> picked(k);
  for (int64_t row = first; row < last; ++row) {
    const SmallImage<T>& image = (*images)[row / wanted];
    const int64_t node = problem->first + row % wanted;
    const T* score = image.score.get() + node * nodes;
    const bool finite = !std::isnan(image.rows.inverse[node]);
    const int32_t* slot = work.slot.data();
    const int64_t count = finite ? select_best<T, kBytes>(score, nullptr, nodes, problem->others(), work) : 0;
    for (int64_t n = 0; n < count; ++n) picked[n] = score[slot[n]];
    write_row(*problem, node, finite, image.own[node], slot, picked.data(), count, index + row * k, out + row * k);
  }
}

DRSEG_LEVELS(score_small, score_pairs)
DRSEG_LEVELS(select_small, select_rows)

template <class T>
void small_grids(
    const Problem<T>& problem, int64_t batch, const T* prior, const T* inverse, int32_t* index, T* score) {
  const int64_t nodes = problem.grid.nodes(), wanted = problem.last - problem.first, side = std::min(nodes, kBlock);
  std::vector<std::pair<int32_t, int32_t>> pairs;
  const int32_t blocks = static_cast<int32_t>(problem.grid.blocks.size());
  for (int32_t one = 0; one < blocks; ++one)
    for (int32_t other = one; other < blocks; ++other) pairs.emplace_back(one, other);
  const int64_t together =
      std::clamp<int64_t>(kScoreBytes / (nodes * nodes * static_cast<int64_t>(sizeof(T))), 1, batch);
  std::vector<SmallImage<T>> images;
  for (int64_t b = 0; b < together; ++b) images.emplace_back(nodes, problem.channels);
  for (int64_t start = 0; start < batch; start += together) {
    const int64_t count = std::min(together, batch - start);
    torch::stable::parallel_for(0, count * blocks, grain(side * problem.channels), [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const Block& block = problem.grid.blocks[task % blocks];
        const int64_t sample = (start + task / blocks) * nodes;
        copy_rows(
            problem, prior + sample * problem.channels, inverse + sample, images[task / blocks].rows, block.first,
            block.first + block.count);
      }
    });
    const int64_t tasks = count * static_cast<int64_t>(pairs.size());
    torch::stable::parallel_for(0, tasks, grain(side * side * problem.channels), [&](int64_t first, int64_t last) {
      DRSEG_CALL(score_small, T, &problem, &images, &pairs, first, last);
    });
    const int64_t offset = start * wanted * problem.k;
    torch::stable::parallel_for(0, count * wanted, grain(8 * nodes), [&](int64_t first, int64_t last) {
      DRSEG_CALL(select_small, T, &problem, &images, index + offset, score + offset, first, last);
    });
  }
}

}  // namespace drseg
