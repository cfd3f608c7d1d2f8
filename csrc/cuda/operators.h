// SPDX-License-Identifier: Apache-2.0
// The operators of this folder.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace drseg::cuda {

using torch::stable::Tensor;

// (B, N, D) -> scaled rows and inverse norms (B, N). If `rounds`, also the scaled rows in float16, and a bound (B, N) on
// the length of their rounding errors over their own. Otherwise both are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> prepare_prior(const Tensor& prior, bool rounds);

// Fills index (B, N, k) int32 and score (B, N, k) of the images from `first` on whose products (images, N, N) these are.
// `join` counts subtract, clamped, product. Without `residual` the products are those of the rows themselves.
void select(
    const Tensor& product, const Tensor& prior, const Tensor& inverse_norm, std::optional<Tensor> residual,
    const Tensor& table, int64_t join, bool include_self, double slack, int64_t first, Tensor index, Tensor score,
    std::optional<Tensor> count);

// Weights of edges, their coefficients unless they stay `apart`, and of sym_row the scales (1, B, N). Rows of source
// (B, N, E), or of both halves (B, N, 2 E), are multiples of 16 bytes. `norm` counts sym_row, row, sym_count.
std::tuple<Tensor, Tensor, Tensor> edge_coefficient(
    const Tensor& source, std::optional<Tensor> target, std::optional<Tensor> inverse_norm, std::optional<Tensor> shift,
    const Tensor& index, const Tensor& vector, const Tensor& bias, std::optional<Tensor> scores, int64_t norm,
    double eps, bool apart);

// Gradients from those of the logits, `slope` (B, N, K). If `need_rows`, those to source and, in one row (2 E + 1), to
// the vector and both biases. Along the columns (`indptr`, `perm`), if they are given, that to target. Without a target
// it is the second half of source.
std::tuple<Tensor, Tensor, Tensor> edge_gradients(
    const Tensor& slope, const Tensor& source, std::optional<Tensor> target, std::optional<Tensor> inverse_norm,
    std::optional<Tensor> shift, const Tensor& index, const Tensor& vector, std::optional<Tensor> indptr,
    std::optional<Tensor> perm, bool need_rows);

// The layer (B, N, C) in the dtype of x. Then the input of LayerNorm in float32, with mean and rstd (B, N); empty for
// other activations. `activation` counts none, relu, layer_norm. Rows are multiples of 16 bytes.
std::tuple<Tensor, Tensor, Tensor, Tensor> graph_layer(
    const Tensor& x, const Tensor& index, const Tensor& coefficient, std::optional<Tensor> scale,
    std::optional<Tensor> bias, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, int64_t activation,
    double eps);

// Gradients from that of the sums. Along the columns (`indptr`, `perm`), if they are given, that to x. If
// `need_coefficient`, that to the coefficients, in float32 and with `added` on top. Otherwise they are empty.
std::tuple<Tensor, Tensor> graph_layer_backward(
    const Tensor& grad, const Tensor& x, const Tensor& index, const Tensor& coefficient, std::optional<Tensor> scale,
    std::optional<Tensor> indptr, std::optional<Tensor> perm, std::optional<Tensor> added, bool need_coefficient);

}  // namespace drseg::cuda
