// SPDX-License-Identifier: Apache-2.0
// The native operators. Python has checked and prepared the arguments; check.h guards memory all the same.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace drseg {

using torch::stable::Tensor;

// Rows scaled by powers of two, or not, and their inverse norms: 0 for a zero row, NaN for one that is not finite.
// (B,N,D) -> (B,N,D), (B,N)
std::tuple<Tensor, Tensor> prepare_prior(const Tensor& prior, bool scale);

// The k best of every node, ascending, with their scores; or those of n nodes, from `first` to before `last`.
// `form` counts additive, gauss, multiplicative, product. (B,N,D), (B,N), (h,w) -> (B,n,k) int32, (B,n,k)
std::tuple<Tensor, Tensor> knn_graph(
    const Tensor& prior, const Tensor& inverse_norm, const Tensor& table, int64_t k, int64_t form, bool include_self,
    int64_t first, std::optional<int64_t> last);

// The edges that end in each node, ascending. (B,N,K) int32 -> (B*N+1,) int32, (B*N*K,) int32
std::tuple<Tensor, Tensor> csc(const Tensor& index);

// softplus(vector . relu(source_i + target_j) + bias), times exp(exponent) where there is one.
// (B,N,E), (B,N,E), (B,N,K) int32, (E,), (), (B,N,K), (B,N,K) -> (B,N,K)
Tensor edge_weight(
    const Tensor& source, const Tensor& target, const Tensor& index, const Tensor& vector, const Tensor& bias,
    std::optional<Tensor> mask, std::optional<Tensor> exponent);

// Gradients to source, target, vector, bias (1,) and exponent, of which there may be none. `indptr` and `perm` are
// those of `csc`, or both are made here.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_weight_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& source, const Tensor& target, const Tensor& index,
    const Tensor& vector, std::optional<Tensor> indptr, std::optional<Tensor> perm, std::optional<Tensor> exponent);

// `norm` counts sym_row, sym_count, sym_inout, row, sym_undirected. (B,N,K), (B,N,K) int32 -> (B,N,K)
Tensor degree_normalize(const Tensor& weight, const Tensor& index, int64_t norm, double eps);

Tensor degree_normalize_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& index, int64_t norm, double eps);

// y_i = sum_k coefficient_ik x_j, or the same along reversed edges. (B,N,C), (B,N,K) int32, (B,N,K) -> (B,N,C)
Tensor graph_propagate(
    const Tensor& x, const Tensor& index, const Tensor& coefficient, bool transpose, std::optional<Tensor> indptr,
    std::optional<Tensor> perm);

// The same along edges that are listed by the node that receives: y_j = sum of coefficient_e x_start(e) over its list.
// (B,N,C), (B*N+1,) int32, (edges,) int32, (edges,) -> (B,N,C)
Tensor graph_propagate_listed(
    const Tensor& x, const Tensor& indptr, const Tensor& start, const Tensor& coefficient);

// <start_i, end_j> for every edge. (B,N,C), (B,N,C), (B,N,K) int32 -> (B,N,K)
Tensor graph_edge_dot(const Tensor& start, const Tensor& end, const Tensor& index);

}  // namespace drseg
