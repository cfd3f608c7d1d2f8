// SPDX-License-Identifier: Apache-2.0
// The native operators. Python has checked and prepared the arguments; check.h guards memory all the same.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace drseg {

using torch::stable::Tensor;

// y_i = sum_k coefficient_ik x_j, or the same along reversed edges. (B,N,C), (B,N,K) int32, (B,N,K) -> (B,N,C)
Tensor graph_propagate(const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose);

// <start_i, end_j> for every edge. (B,N,C), (B,N,C), (B,N,K) int32 -> (B,N,K)
Tensor graph_edge_dot(const Tensor& start, const Tensor& end, const Tensor& index);

}  // namespace drseg
