// SPDX-License-Identifier: Apache-2.0
// A graph by its columns (CSC): the edges that end in each node, so that sums over them need no atomics and have one order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace drseg {

// Edges of a sample and of a batch are counted in 32 bits.
inline constexpr int64_t kMostEdges = int64_t{1} << 31;

// The edges that end in each node, ascending: perm[indptr[n]] to perm[indptr[n + 1]] are those of node n. Both count
// from `first`, the sample's first edge in its batch. The end of the last node is the caller's to write.
inline void list_columns(
    const int32_t* index, int64_t nodes, int64_t slots, int64_t first, int32_t* indptr, int32_t* perm) {
  const int64_t edges = nodes * slots;
  STD_TORCH_CHECK(first + edges < kMostEdges, "csc: expected fewer than 2**31 edges, got ", first + edges);
  // a node's count, one place further; then where its next edge goes, one place further
  std::vector<int64_t> next(nodes + 2, 0);
  for (int64_t e = 0; e < edges; ++e) ++next[clamp_index(index[e], nodes) + 2];
  for (int64_t n = 2; n < nodes + 2; ++n) next[n] += next[n - 1];
  for (int64_t n = 0; n < nodes; ++n) indptr[n] = static_cast<int32_t>(first + next[n + 1]);
  for (int64_t e = 0; e < edges; ++e)
    perm[next[clamp_index(index[e], nodes) + 1]++] = static_cast<int32_t>(first + e);
}

// Columns of a whole batch that the caller has, or none.
struct Columns {
  const int32_t* indptr = nullptr;
  const int32_t* perm = nullptr;
};

// Where the lists of `rows` nodes begin that hold `edges` edges together.
inline const int32_t* check_counts(
    const char* op, const torch::stable::Tensor& indptr, int64_t rows, int64_t edges) {
  check_operand(op, "indptr", indptr, 1, ScalarType::Int);
  STD_TORCH_CHECK(indptr.numel() == rows + 1, op, ": indptr does not match the nodes");
  const int32_t* begin = indptr.const_data_ptr<int32_t>();
  bool counts = begin[0] == 0 && begin[rows] == edges;
  for (int64_t n = 0; n < rows; ++n) counts &= begin[n] <= begin[n + 1];
  STD_TORCH_CHECK(counts, op, ": indptr does not count the edges from 0 to their number");
  return begin;
}

inline Columns check_columns(
    const char* op, const std::optional<torch::stable::Tensor>& indptr,
    const std::optional<torch::stable::Tensor>& perm, const torch::stable::Tensor& index) {
  if (!indptr.has_value() || !perm.has_value()) return {};
  check_operand(op, "perm", *perm, 1, ScalarType::Int);
  STD_TORCH_CHECK(perm->numel() == index.numel(), op, ": perm does not match index");
  const int32_t* begin = check_counts(op, *indptr, index.size(0) * index.size(1), perm->numel());
  return {begin, perm->const_data_ptr<int32_t>()};
}

// Of one sample; the columns are those of the caller where there are any.
class Csc {
 public:
  const int32_t* indptr;  // of the sample's nodes

  Csc(const int32_t* index, const Columns& columns, int64_t sample, int64_t nodes, int64_t slots)
      : edges_(nodes * slots),
        slots_(static_cast<uint64_t>(slots)),
        inverse_(slots > 1 ? ~uint64_t{0} / slots_ + 1 : 0) {
    if (columns.indptr != nullptr) {
      indptr = columns.indptr + sample * nodes;
      perm_ = columns.perm;
      first_ = sample * edges_;
      return;
    }
    own_.resize(nodes + 1 + edges_);
    list_columns(index + sample * edges_, nodes, slots, 0, own_.data(), own_.data() + nodes + 1);
    own_[nodes] = static_cast<int32_t>(edges_);
    indptr = own_.data();
    perm_ = own_.data() + nodes + 1;
  }
  Csc(const Csc&) = delete;
  Csc& operator=(const Csc&) = delete;

  // The edge at a place, counted within the sample, clamped whatever the caller's list holds. And the node it leaves: a
  // quotient by one multiplication, exact below 2**32 (Lemire, Kaser and Kurz 2019).
  int64_t edge(int64_t place) const { return std::clamp<int64_t>(perm_[place] - first_, 0, edges_ - 1); }
  int32_t start(int64_t edge) const {
    if (slots_ == 1) return static_cast<int32_t>(edge);
    return static_cast<int32_t>((static_cast<unsigned __int128>(inverse_) * static_cast<uint64_t>(edge)) >> 64);
  }

 private:
  std::vector<int32_t> own_;
  const int32_t* perm_;
  int64_t first_ = 0, edges_;
  uint64_t slots_, inverse_;
};

// Calls function(sample, csc, first, last) for stretches of the nodes of every sample: columns are listed once per
// sample, samples side by side where there are several, otherwise nodes.
template <class Function>
void for_ends(
    const int32_t* index, const Columns& columns, int64_t batch, int64_t nodes, int64_t slots, int64_t grain,
    Function function) {
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, batch, std::max<int64_t>(1, grain / std::max<int64_t>(1, nodes)), [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) function(b, Csc(index, columns, b, nodes, slots), 0, nodes);
    });
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const Csc csc(index, columns, b, nodes, slots);
    torch::stable::parallel_for(
        0, nodes, grain, [&](int64_t first, int64_t last) { function(b, csc, first, last); });
  }
}

}  // namespace drseg
