// SPDX-License-Identifier: Apache-2.0
// Large grids of many channels: as in knn_large.h, but a block's scores are bounded from both sides first (coarse.h).
// Candidates that can reach a row's threshold wait, as bounds, until there is no room for another block. Then the lower
// bounds raise the threshold. Only if that leaves too many are all of them computed, and the best remain. The rows of a
// block do so together, one block of columns after the other: it is read from memory once.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/coarse.h"
#include "cpu/dot_tile.h"
#include "cpu/knn_large.h"
#include "cpu/knn_rows.h"
#include "cpu/level.h"
#include "cpu/select.h"

namespace drseg {

// The first `exact` candidates of a row are computed; of the others, `score` is the upper bound and `node` the position.
struct CoarseCandidates : Candidates<float> {
  std::vector<float> lower, decay;
  std::vector<int64_t> exact;

  explicit CoarseCandidates(int64_t others)
      : Candidates<float>(others, 8), lower(score.size()), decay(score.size()), exact(kBlock) {}
};

struct CoarseScratch : Scratch<float> {
  std::vector<uint8_t> flag;
  std::vector<int32_t> place;

  CoarseScratch(int64_t room, int64_t k)
      : Scratch<float>(room, k), flag(room + 8), place(room) {}
};

// Drops the candidates of a row that its bounds alone rule out: the k-th best lower bound is below no k-th best score.
template <class T, int kBytes>
DRSEG_INLINE void rule_out(const Problem<T>& problem, CoarseCandidates& candidates, CoarseScratch& scratch, int64_t r) {
  const int64_t offset = r * candidates.room, count = candidates.count[r], exact = candidates.exact[r];
  T *score = candidates.score.data() + offset, *lower = candidates.lower.data() + offset;
  T* decay = candidates.decay.data() + offset;
  int32_t *node = candidates.node.data() + offset, *place = scratch.place.data();
  T threshold = candidates.threshold[r];
  const int64_t most = select_best<T, kBytes>(lower, nullptr, count, problem.others(), scratch.selection);
  T lowest = std::numeric_limits<T>::infinity();
  for (int64_t n = 0; n < most; ++n) lowest = std::min(lowest, lower[scratch.selection.slot[n]]);
  if (most == problem.others()) threshold = std::max(threshold, lowest);
  uint8_t* flag = scratch.flag.data();
  for (int64_t n = 0; n < count; ++n) flag[n] = score[n] >= threshold;
  std::fill_n(flag + count, 8, uint8_t(0));
  const int64_t left = set_places(flag, count, place);
  int64_t computed = 0;
  for (int64_t n = 0; n < left; ++n) {
    // places ascend, so this overwrites nothing that is still to be read
    const int64_t from = place[n];
    score[n] = score[from];
    lower[n] = lower[from];
    decay[n] = decay[from];
    node[n] = node[from];
    computed += from < exact;
  }
  candidates.threshold[r] = threshold;
  candidates.count[r] = left;
  candidates.exact[r] = computed;
}

// Computes the candidates of all rows of a block that no bound rules out, and keeps the best. They lie in the order in
// which blocks were visited since the last time, which is from `begin` to `end`.
template <class T, int kBytes>
DRSEG_INLINE void settle(
    const Problem<T>& problem, const Rows<T>& rows, const Block& block, int64_t begin, int64_t end,
    CoarseCandidates& candidates, CoarseScratch& scratch) {
  for (int64_t r = 0; r < block.count; ++r) rule_out<T, kBytes>(problem, candidates, scratch, r);
  int64_t last[kBlock];
  std::copy_n(candidates.exact.begin(), block.count, last);
  const T* column[kBlock];
  T inverse[kBlock], dot[kBlock];
  for (int64_t visit = begin; visit < end; ++visit) {
    const Block& columns = problem.grid.blocks[scratch.order[visit].block];
    for (int64_t r = 0; r < block.count; ++r) {
      const int64_t first = last[r], offset = r * candidates.room + first, left = candidates.count[r] - first;
      int32_t* node = candidates.node.data() + offset;
      int64_t count = 0;
      for (; count < left && columns.holds(node[count]); ++count) {
        const int32_t at = node[count];
        column[count] = rows.at(at);
        inverse[count] = rows.inverse[at];
        node[count] = problem.grid.node[at];
      }
      last[r] += count;
      const T* own = rows.at(block.first + r);
      dot_block<T, kBytes>(&own, 1, column, count, rows.width, dot, kBlock);
      finish_scores<T, kBytes>(
          problem, rows.inverse[block.first + r], inverse, dot, candidates.decay.data() + offset, count,
          candidates.score.data() + offset);
    }
  }
  for (int64_t r = 0; r < block.count; ++r) {
    cut_back<T, kBytes>(problem, candidates, scratch, r);
    candidates.exact[r] = candidates.count[r];
    const int64_t offset = r * candidates.room;
    std::copy_n(candidates.score.data() + offset, candidates.count[r], candidates.lower.data() + offset);
  }
}

// Adds to the candidates of some rows of a block, given by their places in it, what another block may hold for them.
// Returns whether a row has no room for more.
template <class T, int kBytes>
DRSEG_INLINE bool visit_coarsely(
    const Problem<T>& problem, const Coarse& coarse, const Block& block, const int32_t* live, int64_t count,
    const Block& columns, int64_t other, CoarseCandidates& candidates, CoarseScratch& scratch) {
  bool full = false;
  constexpr int64_t kRows = Coarse::kMostRows;
  T upper[kRows * kBlock], lower[kRows * kBlock], decay[kBlock];
  int64_t position[kRows];
  for (int64_t start = 0; start < count; start += kRows) {
    const int64_t together = std::min(kRows, count - start);
    for (int64_t n = 0; n < together; ++n) position[n] = block.first + live[start + n];
    coarse.bounds(position, together, other, columns.first, upper, lower);
    for (int64_t n = 0; n < together; ++n) {
      const int64_t r = live[start + n], node = problem.grid.node[position[n]];
      const T threshold = candidates.threshold[r];
      T *high = upper + n * kBlock, *low = lower + n * kBlock;
      decay_of_block(problem.decay, columns, node / problem.grid.width, node % problem.grid.width, decay);
      uint8_t flag[kBlock + 8] = {};
      if (problem.subtract) {
        for (int64_t c = 0; c < columns.count; ++c) high[c] = high[c] - decay[c];
      } else {
        for (int64_t c = 0; c < columns.count; ++c) high[c] = join(high[c], decay[c], false, problem.clamp);
      }
      for (int64_t c = 0; c < columns.count; ++c) flag[c] = high[c] >= threshold;
      if (&block == &columns) flag[r] = 0;
      int32_t place[kBlock];
      const int64_t passing = set_places(flag, columns.count, place);
      if (passing == 0) continue;
      const int64_t held = r * candidates.room + candidates.count[r];
      for (int64_t c = 0; c < passing; ++c) {
        const int32_t at = place[c];
        candidates.score[held + c] = high[at];
        candidates.lower[held + c] = join(low[at], decay[at], problem.subtract, problem.clamp);
        candidates.decay[held + c] = decay[at];
        candidates.node[held + c] = static_cast<int32_t>(columns.first) + at;
      }
      candidates.count[r] += passing;
      if (candidates.count[r] + kBlock <= candidates.room) continue;
      // rows of features come from memory, bounds are at hand: none is computed that later ones may rule out
      rule_out<T, kBytes>(problem, candidates, scratch, r);
      full |= candidates.count[r] + 4 * kBlock > candidates.room;
    }
  }
  return full;
}

template <class T, int kBytes>
DRSEG_INLINE void search_block_coarsely(
    const Problem<T>* problem, const Rows<T>* rows, const Bounds<T>* bounds, const Coarse* coarse,
    CoarseCandidates* candidates, CoarseScratch* scratch, int64_t which, int32_t* index, T* out) {
  const std::vector<Block>& blocks = problem->grid.blocks;
  const Block& block = blocks[which];
  candidates->start(*problem, *rows, block);
  std::fill(candidates->exact.begin(), candidates->exact.end(), 0);
  order_blocks(*problem, *bounds, which, *scratch);
  int32_t live[kBlock];
  int64_t settled = 0, visited = 0;
  for (const Visit<T>& visit : scratch->order) {
    if (candidates->live_rows(block, -visit.negative, live) == 0) break;
    const int64_t count = candidates->live_rows(block, visit.bound, live);
    ++visited;
    if (visit_coarsely<T, kBytes>(
            *problem, *coarse, block, live, count, blocks[visit.block], visit.block, *candidates, *scratch)) {
      settle<T, kBytes>(*problem, *rows, block, settled, visited, *candidates, *scratch);
      settled = visited;
    }
  }
  settle<T, kBytes>(*problem, *rows, block, settled, visited, *candidates, *scratch);
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t position = block.first + r;
    const T* own = rows->at(position);
    T dot, decay = problem->decay.own();
    dot_block<T, kBytes>(&own, 1, &own, 1, rows->width, &dot, 1);
    finish_scores<T, kBytes>(*problem, rows->inverse[position], &rows->inverse[position], &dot, &decay, 1, &candidates->own[r]);
  }
  write_block<T, kBytes>(*problem, *rows, block, *candidates, *scratch, index, out);
}

DRSEG_LEVELS(search_coarse, search_block_coarsely)

}  // namespace drseg
