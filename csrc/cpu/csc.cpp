// SPDX-License-Identifier: Apache-2.0
// The edges that end in each node, for a whole batch.

#include "cpu/csc.h"
#include "cpu/grain.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "ops.h"

namespace drseg {

std::tuple<Tensor, Tensor> csc(const Tensor& index) {
  check_operand("drseg_native::csc", "index", index, 3, ScalarType::Int);
  const int64_t batch = index.size(0), nodes = index.size(1), slots = index.size(2), edges = nodes * slots;
  const int64_t all = batch * edges;
  STD_TORCH_CHECK(all < kMostEdges, "drseg_native::csc: expected fewer than 2**31 edges, got ", all);
  Tensor indptr = drseg::allocate(index, {batch * nodes + 1}), perm = drseg::allocate(index, {batch * edges});
  const int32_t* ends = index.const_data_ptr<int32_t>();
  int32_t *begin = indptr.mutable_data_ptr<int32_t>(), *place = perm.mutable_data_ptr<int32_t>();
  begin[0] = 0;
  begin[batch * nodes] = static_cast<int32_t>(batch * edges);
  torch::stable::parallel_for(0, batch, grain(4 * edges), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      list_columns(ends + b * edges, nodes, slots, b * edges, begin + b * nodes, place + b * edges);
  });
  return {indptr, perm};
}

}  // namespace drseg
