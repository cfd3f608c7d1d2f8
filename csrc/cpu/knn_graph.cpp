// SPDX-License-Identifier: Apache-2.0
// The k nodes of highest affinity for every node, or for some, exactly, without an N x N matrix. Small grids are in
// knn_small.h, large ones in knn_large.h, those of many channels in knn_coarse.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/coarse.h"
#include "cpu/grid.h"
#include "cpu/knn_coarse.h"
#include "cpu/knn_large.h"
#include "cpu/knn_rows.h"
#include "cpu/knn_small.h"
#include "cpu/level.h"
#include "ops.h"

namespace drseg {
namespace {

// From here on rows are reduced to a few bits first; fewer channels are not worth it.
constexpr int64_t kCoarseGrid = 2048, kCoarseChannels = 96;

// Blocks differ in what they can leave out, so threads take them one by one; results do not depend on which.
template <class Work>
void take_in_turn(int64_t blocks, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    work([&] { return next++; });
  });
}

template <class T>
void large_grid(
    const Problem<T>& problem, const T* prior, const T* inverse, Bounds<T>& bounds, int32_t* index, T* score) {
  const int64_t blocks = problem.grid.blocks.size();
  Rows<T> rows = Rows<T>::room(problem.grid.nodes(), problem.channels);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Block& block = problem.grid.blocks[b];
      copy_rows(problem, prior, inverse, rows, block.first, block.first + block.count);
      bounds.longest[b] = longest_row(problem, rows, block);
    }
  });
  take_in_turn(blocks, [&](auto next) {
    Candidates<T> candidates(problem.others(), 2);
    Scratch<T> scratch(candidates.room, problem.k);
    for (int64_t which = next(); which < blocks; which = next()) {
      if (!problem.wants(problem.grid.blocks[which])) continue;
      DRSEG_CALL(search, T, &problem, &rows, &bounds, &candidates, &scratch, which, index, score);
    }
  });
}

void coarse_grid(
    const Problem<float>& problem, const float* prior, const float* inverse, Bounds<float>& bounds, int32_t* index,
    float* score) {
  const int64_t blocks = problem.grid.blocks.size(), nodes = problem.grid.nodes();
  Rows<float> rows = Rows<float>::can_view(problem.channels) ? Rows<float>::view(problem, prior)
                                                             : Rows<float>::room(nodes, problem.channels);
  Coarse coarse(nodes, blocks, problem.channels);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const float* row[kBlock];
    for (int64_t b = first; b < last; ++b) {
      const Block& block = problem.grid.blocks[b];
      copy_rows(problem, prior, inverse, rows, block.first, block.first + block.count);
      rows.list(block.first, block.count, row);
      coarse.reduce(row, problem.channels, rows.inverse.data() + block.first, b, block.first, block.count);
      // a row that is not finite has no candidates and is none
      float longest = 0;
      for (int64_t n = 0; n < block.count; ++n) longest = std::max(longest, coarse.length[block.first + n]);
      bounds.longest[b] = longest;
    }
  });
  take_in_turn(blocks, [&](auto next) {
    CoarseCandidates candidates(problem.others());
    CoarseScratch scratch(candidates.room, problem.k);
    for (int64_t which = next(); which < blocks; which = next()) {
      if (!problem.wants(problem.grid.blocks[which])) continue;
      DRSEG_CALL(
          search_coarse, float, &problem, &rows, &bounds, &coarse, &candidates, &scratch, which, index, score);
    }
  });
}

template <class T>
void run(
    const Tensor& prior, const Tensor& inverse_norm, const Tensor& table, const Form form, bool include_self,
    int64_t first, int64_t last, Tensor& index, Tensor& score) {
  const int64_t batch = prior.size(0), nodes = prior.size(1), channels = prior.size(2), k = index.size(2);
  const int64_t h = table.size(0), w = table.size(1);
  const T* decay_table = table.const_data_ptr<T>();
  const bool small = nodes <= kSmallGrid;
  const Grid grid = small ? raster_grid(h, w) : patch_grid(h, w);
  const Decay<T> decay(decay_table, h, w);
  const Problem<T> problem{
      grid, decay, channels, k, form == kAdditive || form == kGauss, form == kMultiplicative, include_self, first, last};
  const T *rows = prior.const_data_ptr<T>(), *inverse = inverse_norm.const_data_ptr<T>();
  int32_t* chosen = index.mutable_data_ptr<int32_t>();
  T* value = score.mutable_data_ptr<T>();
  if (small) {
    small_grids(problem, batch, rows, inverse, chosen, value);
    return;
  }
  Bounds<T> bounds(problem, decay_table);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t sample = b * nodes, slot = b * (last - first) * k;
    const T* image = rows + sample * channels;
    if constexpr (std::is_same_v<T, float>) {
      if (Coarse::available() && nodes >= kCoarseGrid && channels >= kCoarseChannels &&
          channels <= Coarse::kMostChannels && bounds.ascending) {
        coarse_grid(problem, image, inverse + sample, bounds, chosen + slot, value + slot);
        continue;
      }
    }
    large_grid(problem, image, inverse + sample, bounds, chosen + slot, value + slot);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> knn_graph(
    const Tensor& prior, const Tensor& inverse_norm, const Tensor& table, int64_t k, int64_t form, bool include_self,
    int64_t first, std::optional<int64_t> end) {
  constexpr const char* op = "drseg_native::knn_graph";
  const ScalarType dtype = check_floating(op, prior);
  check_operand(op, "prior", prior, 3, dtype);
  check_operand(op, "inverse_norm", inverse_norm, 2, dtype);
  check_operand(op, "table", table, 2, dtype);
  check_leading(op, "inverse_norm", inverse_norm, prior);
  STD_TORCH_CHECK(table.size(0) * table.size(1) == prior.size(1), op, ": table does not have one entry per node");
  STD_TORCH_CHECK(k >= 0 && form >= kAdditive && form <= kProduct, op, ": k or form is out of range");
  STD_TORCH_CHECK(prior.size(1) <= std::numeric_limits<int32_t>::max(), op, ": too many nodes");
  const int64_t last = end.value_or(prior.size(1));
  STD_TORCH_CHECK(0 <= first && first <= last && last <= prior.size(1), op, ": first or last is out of range");
  Tensor index = drseg::allocate(prior, {prior.size(0), last - first, k}, ScalarType::Int);
  Tensor score = drseg::allocate(prior, {prior.size(0), last - first, k});
  if (index.numel() == 0) return {index, score};
  if (dtype == ScalarType::Double) {
    run<double>(prior, inverse_norm, table, Form(form), include_self, first, last, index, score);
  } else {
    run<float>(prior, inverse_norm, table, Form(form), include_self, first, last, index, score);
  }
  return {index, score};
}

}  // namespace drseg
