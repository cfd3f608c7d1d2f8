// SPDX-License-Identifier: Apache-2.0
// A graph by its columns (CSC): the edges that end in each node, so that sums over them need no atomics and have one order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "check.h"

namespace drseg {

// Of one sample: for each end its edges in ascending order. `perm` is the place in (N, K), `start` the node it leaves.
struct Csc {
  std::vector<int64_t> indptr;  // N + 1
  std::vector<int64_t> perm;    // N * K
  std::vector<int32_t> start;   // N * K

  Csc(const int32_t* index, int64_t nodes, int64_t slots)
      : indptr(nodes + 1), perm(nodes * slots), start(nodes * slots) {
    const int64_t edges = nodes * slots;
    for (int64_t e = 0; e < edges; ++e) ++indptr[clamp_index(index[e], nodes) + 1];
    for (int64_t n = 0; n < nodes; ++n) indptr[n + 1] += indptr[n];
    std::vector<int64_t> next(indptr.begin(), indptr.end() - 1);
    for (int64_t i = 0, e = 0; i < nodes; ++i)
      for (int64_t k = 0; k < slots; ++k, ++e) {
        const int64_t place = next[clamp_index(index[e], nodes)]++;
        perm[place] = e;
        start[place] = static_cast<int32_t>(i);
      }
  }
};

// Calls function(sample, csc, first, last) for stretches of the nodes of every sample: columns are listed once per
// sample, samples side by side where there are several, otherwise nodes.
template <class Function>
void for_ends(const int32_t* index, int64_t batch, int64_t nodes, int64_t slots, int64_t grain, Function function) {
  if (batch >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) function(b, Csc(index + b * nodes * slots, nodes, slots), 0, nodes);
    });
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const Csc csc(index + b * nodes * slots, nodes, slots);
    torch::stable::parallel_for(
        0, nodes, grain, [&](int64_t first, int64_t last) { function(b, csc, first, last); });
  }
}

}  // namespace drseg
