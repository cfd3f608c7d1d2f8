// SPDX-License-Identifier: Apache-2.0
// Large grids: each block of rows visits the blocks of columns from the best bound on. A row's k-th best score so far is
// its threshold, and it leaves out the blocks that their spatial decay alone keeps below it. What passes goes to the
// row's candidates, which are cut back to the k best whenever there is not room for another block.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/dot_tile.h"
#include "cpu/knn_rows.h"
#include "cpu/level.h"
#include "cpu/select.h"

namespace drseg {

// Up to this many nodes are ordered without branches: for each, those that come before it are counted.
constexpr int64_t kMostCounted = 256;

// The best decay between any two cells of two blocks by their distance in blocks, and the largest norm (as scaled) of
// each block. Together they bound every score between the blocks. NaN stands for cells that may not be neighbours.
// Blocks that have nothing but NaN between them are never multiplied.
template <class T>
struct Bounds {
  int64_t columns;
  std::vector<T> best;     // by blocks apart; NaN where no cells may be neighbours
  std::vector<T> longest;  // by block, set by who knows the rows
  bool ascending = true;  // whether a larger cosine is nowhere a lower score, or none

  Bounds(const Problem<T>& problem, const T* table) : longest(problem.grid.blocks.size()) {
    const Grid& grid = problem.grid;
    const int64_t h = grid.height, w = grid.width, bh = grid.block_height, bw = grid.block_width;
    const int64_t down = (h + bh - 1) / bh;
    columns = (w + bw - 1) / bw;
    best.resize(down * columns);
    for (int64_t n = 0; n < grid.nodes(); ++n)
      ascending &= problem.subtract || std::isnan(table[n]) ||
                   (table[n] >= 0 && table[n] <= std::numeric_limits<T>::max());
    for (int64_t v = 0; v < down; ++v)
      for (int64_t u = 0; u < columns; ++u) {
        T value = std::numeric_limits<T>::quiet_NaN();
        for (int64_t y = std::max<int64_t>(0, (v - 1) * bh + 1); y < std::min(h, (v + 1) * bh); ++y)
          for (int64_t x = std::max<int64_t>(0, (u - 1) * bw + 1); x < std::min(w, (u + 1) * bw); ++x) {
            const T entry = table[y * w + x];
            value = problem.subtract ? std::fmin(value, entry) : std::fmax(value, std::abs(entry));
          }
        best[v * columns + u] = value;
      }
  }

  T decay(const Block& one, const Block& other) const {
    return best[std::abs(one.top - other.top) * columns + std::abs(one.left - other.left)];
  }

  T bound(const Problem<T>& problem, const Block& one, const Block& other, T one_length, T other_length) const {
    // a computed dot exceeds the product of the norms by less than this
    const T slack = 1 + T(problem.channels + 8) * 4 * std::numeric_limits<T>::epsilon();
    return join(one_length * other_length * slack, decay(one, other), problem.subtract, false);
  }
};

template <class T>
T longest_row(const Problem<T>& problem, const Rows<T>& rows, const Block& block) {
  double longest = 0;
  for (int64_t p = block.first; p < block.first + block.count; ++p) {
    const T* row = rows.at(p);
    double sum = 0;
    for (int64_t d = 0; d < problem.channels; ++d) sum += double(row[d]) * double(row[d]);
    const double length = std::sqrt(sum) * double(rows.inverse[p]);
    // a row that is not finite has no candidates and is none
    if (length > longest) longest = length;
  }
  return T(longest * (1 + 1e-6));
}

template <class T>
struct Candidates {
  int64_t room;  // of each row
  std::vector<T> score, threshold, own;
  std::vector<int32_t> node;
  std::vector<int64_t> count;

  // `blocks`: how many can pass whole before a row must be cut back
  Candidates(int64_t others, int64_t blocks)
      : room(2 * others + blocks * kBlock),
        score(kBlock * room + 1),
        threshold(kBlock),
        own(kBlock),
        node(kBlock * room + 1),
        count(kBlock) {}

  // Empties all rows. Those that are not wanted, want nothing, or are not finite, hold up nothing.
  void start(const Problem<T>& problem, const Rows<T>& rows, const Block& block) {
    std::fill(count.begin(), count.end(), 0);
    for (int64_t r = 0; r < kBlock; ++r) {
      const bool searching = r < block.count && problem.others() > 0 &&
                             problem.wants(int64_t(problem.grid.node[block.first + r])) &&
                             !std::isnan(rows.inverse[block.first + r]);
      threshold[r] = (searching ? -1 : 1) * std::numeric_limits<T>::infinity();
    }
  }

  // Places of the rows that a score of `bound` may concern.
  int64_t live_rows(const Block& block, T bound, int32_t* live) const {
    int64_t found = 0;
    for (int32_t r = 0; r < block.count; ++r) {
      live[found] = r;
      found += bound >= threshold[r];
    }
    return found;
  }
};

// A block that another one looks into, and what no score between the two exceeds.
template <class T>
struct Visit {
  T negative;  // of the bound, rounded
  int64_t away;
  int32_t block;
  T bound;

  bool operator<(const Visit& other) const {
    return std::tie(negative, away, block) < std::tie(other.negative, other.away, other.block);
  }
};

// What a thread works with.
template <class T>
struct Scratch {
  Selection<T> selection;
  std::vector<int32_t> slot, node;
  std::vector<T> score;
  std::vector<Visit<T>> order;

  Scratch(int64_t room, int64_t k) : selection(room, k), slot(k), node(k), score(k) {}
};

// At least the number, and at most a 32nd more: what differs by its rounding alone is one number.
template <class T>
T rounded_up(T value) {
  int exponent = 0;
  const T part = std::frexp(value, &exponent);
  return std::ldexp(std::ceil(part * 64), exponent - 6);
}

// The blocks from the best bound down; of bounds that are about the same, nearest first: a row's best are there.
template <class T>
void order_blocks(const Problem<T>& problem, const Bounds<T>& bounds, int64_t which, Scratch<T>& scratch) {
  const std::vector<Block>& blocks = problem.grid.blocks;
  scratch.order.clear();
  for (size_t b = 0; b < blocks.size(); ++b) {
    if (std::isnan(bounds.decay(blocks[which], blocks[b]))) continue;
    const T bound = bounds.bound(problem, blocks[which], blocks[b], bounds.longest[which], bounds.longest[b]);
    const int64_t down = blocks[which].top - blocks[b].top, across = blocks[which].left - blocks[b].left;
    scratch.order.push_back({-rounded_up(bound), down * down + across * across, static_cast<int32_t>(b), bound});
  }
  std::sort(scratch.order.begin(), scratch.order.end());
}

// Keeps the best candidates of a row; their lowest score becomes its threshold.
template <class T, int kBytes>
DRSEG_INLINE void cut_back(const Problem<T>& problem, Candidates<T>& candidates, Scratch<T>& scratch, int64_t r) {
  T* score = candidates.score.data() + r * candidates.room;
  int32_t* node = candidates.node.data() + r * candidates.room;
  const int64_t count = select_best<T, kBytes>(score, node, candidates.count[r], problem.others(), scratch.selection);
  const int32_t* slot = scratch.selection.slot.data();
  T lowest = std::numeric_limits<T>::infinity();
  for (int64_t n = 0; n < count; ++n) {
    score[n] = score[slot[n]];
    node[n] = node[slot[n]];
    lowest = score[n] < lowest ? score[n] : lowest;
  }
  candidates.count[r] = count;
  if (count == problem.others()) candidates.threshold[r] = lowest;
}

// The rows' answers from their candidates, which are cut back.
template <class T, int kBytes>
DRSEG_INLINE void write_block(
    const Problem<T>& problem, const Rows<T>& rows, const Block& block, const Candidates<T>& candidates,
    Scratch<T>& scratch, int32_t* index, T* out) {
  // names in whole vectors, the rest of them above any node
  constexpr int64_t lanes = 2 * kBytes / sizeof(int32_t);
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t node = problem.grid.node[block.first + r], count = candidates.count[r];
    if (!problem.wants(node)) continue;
    const bool finite = !std::isnan(rows.inverse[block.first + r]);
    const T* score = candidates.score.data() + r * candidates.room;
    const int32_t* name = candidates.node.data() + r * candidates.room;
    if (count <= kMostCounted) {
      int32_t padded[kMostCounted + lanes];
      std::copy_n(name, count, padded);
      const int64_t whole = (count + lanes - 1) / lanes * lanes;
      std::fill(padded + count, padded + whole, std::numeric_limits<int32_t>::max());
      for (int64_t n = 0; n < count; ++n) {
        const int64_t rank = whole - count_from<float, kBytes>(padded, whole, name[n]);
        scratch.node[rank] = name[n];
        scratch.score[rank] = score[n];
      }
    } else {
      std::iota(scratch.slot.begin(), scratch.slot.begin() + count, 0);
      std::sort(scratch.slot.begin(), scratch.slot.begin() + count, [name](int32_t a, int32_t b) {
        return name[a] < name[b];
      });
      for (int64_t n = 0; n < count; ++n) {
        scratch.node[n] = name[scratch.slot[n]];
        scratch.score[n] = score[scratch.slot[n]];
      }
    }
    write_row(
        problem, node, finite, candidates.own[r], scratch.node.data(), scratch.score.data(), count,
        index + (node - problem.first) * problem.k, out + (node - problem.first) * problem.k);
  }
}

// Takes those of a row's scores with a block that reach its threshold: an equal one may still win by its lower index.
template <class T, int kBytes>
DRSEG_INLINE void take_scores(
    const Problem<T>& problem, int64_t r, const T* score, const int32_t* name, int64_t count,
    Candidates<T>& candidates, Scratch<T>& scratch) {
  const T threshold = candidates.threshold[r];
  int32_t passing = 0;
  for (int64_t c = 0; c < count; ++c) passing += score[c] >= threshold;
  if (passing == 0) return;
  T* kept = candidates.score.data() + r * candidates.room;
  int32_t* node = candidates.node.data() + r * candidates.room;
  int64_t held = candidates.count[r];
  for (int64_t c = 0; c < count; ++c) {
    kept[held] = score[c];
    node[held] = name[c];
    held += score[c] >= threshold;
  }
  candidates.count[r] = held;
  if (held + kBlock > candidates.room) cut_back<T, kBytes>(problem, candidates, scratch, r);
}

// Scores of some rows of a block, given by their places in it, with another block.
template <class T, int kBytes>
DRSEG_INLINE void visit_block(
    const Problem<T>& problem, const Rows<T>& rows, const Block& block, const int32_t* live, int64_t count,
    const Block& columns, Candidates<T>& candidates, Scratch<T>& scratch) {
  T dot[kBlock * kBlock], score[kBlock];
  const T *row[kBlock], *column[kBlock];
  for (int64_t n = 0; n < count; ++n) row[n] = rows.at(block.first + live[n]);
  rows.list(columns.first, columns.count, column);
  dot_block<T, kBytes>(row, count, column, columns.count, rows.width, dot, kBlock);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t r = live[n];
    finish_row<T, kBytes>(problem, rows, block.first + r, columns, dot + n * kBlock, score);
    if (block.first == columns.first) {
      candidates.own[r] = score[r];
      score[r] = std::numeric_limits<T>::quiet_NaN();
    }
    take_scores<T, kBytes>(
        problem, r, score, problem.grid.node.data() + columns.first, columns.count, candidates, scratch);
  }
}

template <class T, int kBytes>
DRSEG_INLINE void search_block(
    const Problem<T>* problem, const Rows<T>* rows, const Bounds<T>* bounds, Candidates<T>* candidates,
    Scratch<T>* scratch, int64_t which, int32_t* index, T* out) {
  const std::vector<Block>& blocks = problem->grid.blocks;
  const Block& block = blocks[which];
  candidates->start(*problem, *rows, block);
  order_blocks(*problem, *bounds, which, *scratch);
  int32_t live[kBlock];
  std::iota(live, live + kBlock, 0);
  // the block itself before all: its own scores are needed anyway
  visit_block<T, kBytes>(*problem, *rows, block, live, block.count, block, *candidates, *scratch);
  for (const Visit<T>& visit : scratch->order) {
    if (visit.block == which) continue;
    if (candidates->live_rows(block, -visit.negative, live) == 0) break;
    const int64_t count = candidates->live_rows(block, visit.bound, live);
    visit_block<T, kBytes>(*problem, *rows, block, live, count, blocks[visit.block], *candidates, *scratch);
  }
  for (int64_t r = 0; r < block.count; ++r) cut_back<T, kBytes>(*problem, *candidates, *scratch, r);
  write_block<T, kBytes>(*problem, *rows, block, *candidates, *scratch, index, out);
}

DRSEG_LEVELS(search, search_block)

}  // namespace drseg
