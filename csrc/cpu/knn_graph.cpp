// SPDX-License-Identifier: Apache-2.0
// The k nodes of highest affinity for every node, exactly, without an N x N matrix.
//
// Small grids: the scores of one image fit into a small buffer; each pair is computed once and serves both its rows.
// Large grids: each block of rows visits the blocks of columns from the nearest on. A row's k-th best score so far is
// its threshold, and it leaves out the blocks that their spatial decay alone keeps below it. What passes goes to the
// row's candidates, which are cut back to the k best whenever there is not room for another block.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/coarse.h"
#include "cpu/dot_tile.h"
#include "cpu/grid.h"
#include "cpu/level.h"
#include "cpu/select.h"
#include "ops.h"

namespace drseg {
namespace {

// Largest N whose N x N scores are held at once: 4 MB in float32.
constexpr int64_t kSmallGrid = 1024;
// From here on rows are reduced to a few bits first; fewer channels are not worth it.
constexpr int64_t kCoarseGrid = 2048, kCoarseChannels = 96;
// Memory for the scores of several small images.
constexpr int64_t kScoreBytes = 32 << 20;

enum Form : int64_t { kAdditive, kGauss, kMultiplicative, kProduct };

template <class T>
DRSEG_INLINE T join(T cosine, T decay, bool subtract, bool clamp) {
  if (subtract) return cosine - decay;
  return (clamp && cosine < T(0) ? T(0) : cosine) * decay;
}

template <class T>
struct Rows {
  std::unique_ptr<T[]> memory;
  T* value;       // (N, stride) in the order of positions
  T* inverse;     // (N,) inverse norms
  int64_t stride, width;

  explicit Rows(int64_t nodes, int64_t channels)
      : stride(row_stride<T>(channels)), width(padded_width<T>(channels)) {
    const int64_t unit = kRowUnit / sizeof(T);
    memory = std::make_unique_for_overwrite<T[]>(nodes * (stride + 1) + unit);
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
    value = memory.get() + (kRowUnit - address % kRowUnit) % kRowUnit / sizeof(T);
    inverse = value + nodes * stride;
  }

  T* at(int64_t position) const { return value + position * stride; }

  void list(int64_t first, int64_t count, const T** row) const {
    for (int64_t n = 0; n < count; ++n) row[n] = at(first + n);
  }
};

template <class T>
struct Problem {
  const Grid& grid;
  const Decay<T>& decay;
  int64_t channels, k;
  bool subtract, clamp, include_self;

  // neighbours to be chosen beside the node itself
  int64_t others() const { return k - (include_self && k > 0 ? 1 : 0); }
};

template <class T>
void copy_rows(const Problem<T>& problem, const T* prior, const T* inverse, Rows<T>& rows, int64_t first, int64_t last) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t node = problem.grid.node[p];
    T* row = rows.at(p);
    std::copy_n(prior + node * problem.channels, problem.channels, row);
    std::fill(row + problem.channels, row + rows.stride, T(0));
    rows.inverse[p] = inverse[node];
  }
}

// Scores of one row with some others: NaN where either node is not finite. All scores are made here, so that equal
// dots are equal scores whatever the compiler makes of the products.
template <class T>
DRSEG_INLINE void finish_scores(
    const Problem<T>& problem, T own, const T* inverse, const T* dot, const T* decay, int64_t count, T* score) {
  if (problem.subtract) {
    for (int64_t c = 0; c < count; ++c) score[c] = dot[c] * own * inverse[c] - decay[c];
  } else {
    for (int64_t c = 0; c < count; ++c) score[c] = join(dot[c] * own * inverse[c], decay[c], false, problem.clamp);
  }
}

template <class T>
DRSEG_INLINE void finish_row(
    const Problem<T>& problem, const Rows<T>& rows, int64_t p, const Block& columns, const T* dot, T* score) {
  const int64_t node = problem.grid.node[p];
  T decay[kBlock];
  decay_of_block(problem.decay, columns, node / problem.grid.width, node % problem.grid.width, decay);
  finish_scores(problem, rows.inverse[p], rows.inverse + columns.first, dot, decay, columns.count, score);
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

// --- small grids -----------------------------------------------------------------------------------------------------

template <class T>
struct SmallImage {
  Rows<T> rows;
  std::unique_ptr<T[]> score;  // (N, N), -inf where a node may not be chosen
  std::vector<T> own;          // score of each node with itself

  SmallImage(int64_t nodes, int64_t channels)
      : rows(nodes, channels), score(std::make_unique_for_overwrite<T[]>(nodes * nodes)), own(nodes) {}
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
    finish_row(problem, rows, one.first + r, other, dot + r * kBlock, score);
    keep_scores(image, one.first + r, other, score, nodes);
  }
  if (one.first == other.first) return;
  for (int64_t r = 0; r < one.count; ++r)
    for (int64_t c = 0; c < other.count; ++c) turned[c * kBlock + r] = dot[r * kBlock + c];
  for (int64_t c = 0; c < other.count; ++c) {
    finish_row(problem, rows, other.first + c, one, turned + c * kBlock, score);
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
  const int64_t nodes = problem->grid.nodes(), k = problem->k;
  Selection<T> work(nodes, k);
  std::vector<T> picked(k);
  for (int64_t row = first; row < last; ++row) {
    const SmallImage<T>& image = (*images)[row / nodes];
    const int64_t node = row % nodes;
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
  const int64_t nodes = problem.grid.nodes();
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
    torch::stable::parallel_for(0, count * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const Block& block = problem.grid.blocks[task % blocks];
        const int64_t sample = (start + task / blocks) * nodes;
        copy_rows(
            problem, prior + sample * problem.channels, inverse + sample, images[task / blocks].rows, block.first,
            block.first + block.count);
      }
    });
    torch::stable::parallel_for(0, count * static_cast<int64_t>(pairs.size()), 1, [&](int64_t first, int64_t last) {
      DRSEG_CALL(score_small, T, &problem, &images, &pairs, first, last);
    });
    const int64_t offset = start * nodes * problem.k;
    torch::stable::parallel_for(0, count * nodes, 16, [&](int64_t first, int64_t last) {
      DRSEG_CALL(select_small, T, &problem, &images, index + offset, score + offset, first, last);
    });
  }
}

// --- large grids -----------------------------------------------------------------------------------------------------

// The best decay between any two cells of two blocks so many blocks apart, and the largest norm (as scaled) of each
// block: together they bound every score between the blocks.
template <class T>
struct Bounds {
  int64_t columns;
  std::vector<T> best;     // by blocks apart
  std::vector<T> longest;  // by block

  Bounds(const Problem<T>& problem, const T* table) {
    const Grid& grid = problem.grid;
    const int64_t h = grid.height, w = grid.width, bh = grid.block_height, bw = grid.block_width;
    const int64_t down = (h + bh - 1) / bh;
    columns = (w + bw - 1) / bw;
    best.resize(down * columns);
    for (int64_t v = 0; v < down; ++v)
      for (int64_t u = 0; u < columns; ++u) {
        T value = problem.subtract ? std::numeric_limits<T>::infinity() : T(0);
        for (int64_t y = std::max<int64_t>(0, (v - 1) * bh + 1); y < std::min(h, (v + 1) * bh); ++y)
          for (int64_t x = std::max<int64_t>(0, (u - 1) * bw + 1); x < std::min(w, (u + 1) * bw); ++x) {
            const T entry = table[y * w + x];
            value = problem.subtract ? std::min(value, entry) : std::max(value, std::abs(entry));
          }
        best[v * columns + u] = value;
      }
  }

  T bound(const Problem<T>& problem, const Block& one, const Block& other, T one_length, T other_length) const {
    // a computed dot exceeds the product of the norms by less than this
    const T slack = 1 + T(problem.channels + 8) * 4 * std::numeric_limits<T>::epsilon();
    const T value = best[std::abs(one.top - other.top) * columns + std::abs(one.left - other.left)];
    return join(one_length * other_length * slack, value, problem.subtract, false);
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
  int64_t room;
  std::vector<T> score, threshold, own;
  std::vector<int32_t> node;
  std::vector<int64_t> count;

  Candidates(int64_t others)
      : room(2 * others + 2 * kBlock), score(kBlock * room + 1), threshold(kBlock), own(kBlock), node(kBlock * room + 1),
        count(kBlock) {}
};

template <class T>
struct Scratch {
  Selection<T> selection;
  std::vector<int32_t> slot, node;
  std::vector<T> score;
  std::vector<std::pair<T, int32_t>> order;

  Scratch(int64_t room, int64_t k) : selection(room, k), slot(k), node(k), score(k) {}
};

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
    finish_row(problem, rows, block.first + r, columns, dot + n * kBlock, score);
    if (block.first == columns.first) {
      candidates.own[r] = score[r];
      score[r] = std::numeric_limits<T>::quiet_NaN();
    }
    take_scores<T, kBytes>(
        problem, r, score, problem.grid.node.data() + columns.first, columns.count, candidates, scratch);
  }
}

// The same, but computes only what the coarse bounds cannot rule out.
template <class T, int kBytes>
DRSEG_INLINE void visit_coarsely(
    const Problem<T>& problem, const Rows<T>& rows, const Coarse& coarse, const Block& block, const int32_t* live,
    int64_t count, const Block& columns, Candidates<T>& candidates, Scratch<T>& scratch) {
  T upper[kBlock * kBlock], decay[kBlock], dot[kBlock], inverse[kBlock], score[kBlock];
  int64_t position[kBlock];
  for (int64_t n = 0; n < count; ++n) position[n] = block.first + live[n];
  coarse.bounds(position, count, columns.first, columns.count, upper, kBlock);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t r = live[n], node = problem.grid.node[position[n]];
    const T threshold = candidates.threshold[r];
    decay_of_block(problem.decay, columns, node / problem.grid.width, node % problem.grid.width, decay);
    const T* bound = upper + n * kBlock;
    uint8_t flag[kBlock + 8] = {};
    if (problem.subtract) {
      for (int64_t c = 0; c < columns.count; ++c) flag[c] = bound[c] - decay[c] >= threshold;
    } else {
      // a negative decay is none, but a table may hold one
      for (int64_t c = 0; c < columns.count; ++c)
        flag[c] = std::max(bound[c], T(0)) * std::abs(decay[c]) >= threshold || !(decay[c] >= 0);
    }
    int32_t place[kBlock], name[kBlock];
    const T *row = rows.at(position[n]), *column[kBlock];
    const int64_t passing = set_places(flag, columns.count, place);
    if (passing == 0) continue;
    for (int64_t c = 0; c < passing; ++c) column[c] = rows.at(columns.first + place[c]);
    dot_block<T, kBytes>(&row, 1, column, passing, rows.width, dot, kBlock);
    for (int64_t c = 0; c < passing; ++c) {
      name[c] = problem.grid.node[columns.first + place[c]];
      inverse[c] = rows.inverse[columns.first + place[c]];
      // places ascend, so this overwrites nothing that is still to be read
      decay[c] = decay[place[c]];
    }
    finish_scores(problem, rows.inverse[position[n]], inverse, dot, decay, passing, score);
    take_scores<T, kBytes>(problem, r, score, name, passing, candidates, scratch);
  }
}

template <class T, int kBytes>
DRSEG_INLINE void search_block(
    const Problem<T>* given, const Rows<T>* rows_given, const Bounds<T>* bounds, const Coarse* coarse,
    Candidates<T>* candidates_given, Scratch<T>* scratch_given, int64_t which, int32_t* index, T* out) {
  const Problem<T>& problem = *given;
  const Rows<T>& rows = *rows_given;
  Candidates<T>& candidates = *candidates_given;
  Scratch<T>& scratch = *scratch_given;
  const Block& block = problem.grid.blocks[which];
  std::fill(candidates.count.begin(), candidates.count.end(), 0);
  // rows that want nothing, or are not finite, hold up nothing
  for (int64_t r = 0; r < kBlock; ++r) {
    const bool searching = r < block.count && problem.others() > 0 && !std::isnan(rows.inverse[block.first + r]);
    candidates.threshold[r] = (searching ? -1 : 1) * std::numeric_limits<T>::infinity();
  }
  scratch.order.clear();
  for (size_t b = 0; b < problem.grid.blocks.size(); ++b) {
    const T bound = bounds->bound(problem, block, problem.grid.blocks[b], bounds->longest[which], bounds->longest[b]);
    scratch.order.emplace_back(-bound, static_cast<int32_t>(b));
  }
  // from the best bound down: nearest first, the block itself before all (its own scores are needed anyway)
  std::sort(scratch.order.begin(), scratch.order.end());
  int32_t live[kBlock];
  std::iota(live, live + kBlock, 0);
  visit_block<T, kBytes>(problem, rows, block, live, block.count, block, candidates, scratch);
  const int64_t nearest = 9 + problem.k / kBlock;
  int64_t visited = 1;
  for (const auto& [negative, other] : scratch.order) {
    if (other == which) continue;
    int64_t count = 0;
    for (int32_t r = 0; r < block.count; ++r) {
      live[count] = r;
      count += -negative >= candidates.threshold[r];
    }
    if (count == 0) break;
    const Block& columns = problem.grid.blocks[other];
    if constexpr (std::is_same_v<T, float>) {
      if (coarse != nullptr && visited >= nearest) {
        visit_coarsely<T, kBytes>(problem, rows, *coarse, block, live, count, columns, candidates, scratch);
        continue;
      }
    }
    visit_block<T, kBytes>(problem, rows, block, live, count, columns, candidates, scratch);
    // the thresholds are to be good before bounds are held against them
    if (++visited == nearest)
      for (int64_t r = 0; r < block.count; ++r) cut_back<T, kBytes>(problem, candidates, scratch, r);
  }
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t node = problem.grid.node[block.first + r];
    const bool finite = !std::isnan(rows.inverse[block.first + r]);
    cut_back<T, kBytes>(problem, candidates, scratch, r);
    const int64_t count = candidates.count[r];
    const T* score = candidates.score.data() + r * candidates.room;
    const int32_t* name = candidates.node.data() + r * candidates.room;
    std::iota(scratch.slot.begin(), scratch.slot.begin() + count, 0);
    std::sort(scratch.slot.begin(), scratch.slot.begin() + count, [name](int32_t a, int32_t b) {
      return name[a] < name[b];
    });
    for (int64_t n = 0; n < count; ++n) {
      scratch.node[n] = name[scratch.slot[n]];
      scratch.score[n] = score[scratch.slot[n]];
    }
    write_row(
        problem, node, finite, candidates.own[r], scratch.node.data(), scratch.score.data(), count,
        index + node * problem.k, out + node * problem.k);
  }
}

DRSEG_LEVELS(search, search_block)

template <class T>
void large_grid(
    const Problem<T>& problem, const T* prior, const T* inverse, const T* table, int32_t* index, T* score) {
  const int64_t blocks = problem.grid.blocks.size();
  Rows<T> rows(problem.grid.nodes(), problem.channels);
  Bounds<T> bounds(problem, table);
  bounds.longest.resize(blocks);
  std::unique_ptr<Coarse> coarse;
  if constexpr (std::is_same_v<T, float>) {
    if (Coarse::available() && problem.grid.nodes() >= kCoarseGrid && problem.channels >= kCoarseChannels)
      coarse = std::make_unique<Coarse>(problem.grid.nodes(), problem.channels);
  }
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Block& block = problem.grid.blocks[b];
      copy_rows(problem, prior, inverse, rows, block.first, block.first + block.count);
      bounds.longest[b] = longest_row(problem, rows, block);
      if constexpr (std::is_same_v<T, float>) {
        if (coarse != nullptr)
          coarse->reduce(
              rows.at(block.first), rows.stride, problem.channels, rows.inverse + block.first, block.first, block.count);
      }
    }
  });
  // blocks differ in what they can leave out, so threads take them one by one; results do not depend on which
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    Candidates<T> candidates(problem.others());
    Scratch<T> scratch(candidates.room, problem.k);
    for (int64_t which = next++; which < blocks; which = next++) {
      DRSEG_CALL(
          search, T, &problem, &rows, &bounds, coarse.get(), &candidates, &scratch, which, index, score);
    }
  });
}

template <class T>
void run(
    const Tensor& prior, const Tensor& inverse_norm, const Tensor& table, const Form form, bool include_self,
    Tensor& index, Tensor& score) {
  const int64_t batch = prior.size(0), nodes = prior.size(1), channels = prior.size(2), k = index.size(2);
  const int64_t h = table.size(0), w = table.size(1);
  const T* decay_table = table.const_data_ptr<T>();
  const bool small = nodes <= kSmallGrid;
  const Grid grid = small ? raster_grid(h, w) : patch_grid(h, w);
  const Decay<T> decay(decay_table, h, w);
  const Problem<T> problem{
      grid, decay, channels, k, form == kAdditive || form == kGauss, form == kMultiplicative, include_self};
  const T *features = prior.const_data_ptr<T>(), *inverse = inverse_norm.const_data_ptr<T>();
  int32_t* chosen = index.mutable_data_ptr<int32_t>();
  T* value = score.mutable_data_ptr<T>();
  if (small) {
    small_grids(problem, batch, features, inverse, chosen, value);
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t sample = b * nodes;
    large_grid(
        problem, features + sample * channels, inverse + sample, decay_table, chosen + sample * k, value + sample * k);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> knn_graph(
    const Tensor& prior, const Tensor& inverse_norm, const Tensor& table, int64_t k, int64_t form, bool include_self) {
  constexpr const char* op = "drseg_native::knn_graph";
  const ScalarType dtype = check_floating(op, prior);
  check_operand(op, "prior", prior, 3, dtype);
  check_operand(op, "inverse_norm", inverse_norm, 2, dtype);
  check_operand(op, "table", table, 2, dtype);
  check_leading(op, "inverse_norm", inverse_norm, prior);
  STD_TORCH_CHECK(table.size(0) * table.size(1) == prior.size(1), op, ": table does not have one entry per node");
  STD_TORCH_CHECK(k >= 0 && form >= kAdditive && form <= kProduct, op, ": k or form is out of range");
  STD_TORCH_CHECK(prior.size(1) <= std::numeric_limits<int32_t>::max(), op, ": too many nodes");
  Tensor index = torch::stable::new_empty(prior, {prior.size(0), prior.size(1), k}, ScalarType::Int);
  Tensor score = torch::stable::new_empty(prior, {prior.size(0), prior.size(1), k});
  if (index.numel() == 0) return {index, score};
  if (dtype == ScalarType::Double) {
    run<double>(prior, inverse_norm, table, Form(form), include_self, index, score);
  } else {
    run<float>(prior, inverse_norm, table, Form(form), include_self, index, score);
  }
  return {index, score};
}

}  // namespace drseg
