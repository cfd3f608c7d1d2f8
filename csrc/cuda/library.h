// SPDX-License-Identifier: Apache-2.0
// What the operators of this folder share on the host: checks, views of tensors, the stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "cuda/warp.cuh"

namespace drseg::cuda {

using torch::stable::Tensor;

template <class T>
constexpr ScalarType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, int>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, device::half>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, device::bfloat16>) return ScalarType::BFloat16;
}

template <class T>
device::Global<const T> read(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.numel()};
}
template <class T>
device::Global<T> write(Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.numel()};
}

// The device of a tensor made current for as long as this lives, and its stream.
class OnDevice {
 public:
#ifdef DRSEG_EMULATE
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {}
  void* stream() const {
    void* found = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &found));
    return found;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
#endif
};

inline unsigned blocks(int64_t all, int64_t each) { return unsigned((all + each - 1) / each); }

// A block's shared memory on the smallest of the architectures.
constexpr size_t LEAST_SHARED = 99 << 10;

// The rows of an image are cut into as many parts as keep the device busy for the shortest time. Every block first
// reads the image, which takes as long as a sixteenth of its rows.
inline int rows_of_block(int64_t nodes, int64_t others, int at_once) {
  int64_t best = nodes, least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min<int64_t>(nodes, 64); ++parts) {
    const int64_t rows = (nodes + parts - 1) / parts, used = (nodes + rows - 1) / rows;
    const int64_t time = (others * used + at_once - 1) / at_once * (16 * rows + nodes);
    if (time < least) {
      least = time;
      best = rows;
    }
  }
  return int(best);
}

// A number that a template takes, handed on as a value.
template <int N>
using Size = std::integral_constant<int, N>;

inline Parameter parameter(const Tensor& tensor) {
  const bool is_half = tensor.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_half || tensor.scalar_type() == ScalarType::Float, "drseg_native_cuda: a parameter has an unexpected dtype");
  return {read<float>(tensor), read<device::bfloat16>(tensor), is_half};
}

// ------------------------------------------------------------------ operators

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

// Whether the rows of an edge MLP are bfloat16, all of whose operands are right.
bool check_halves(
    const char* op, const Tensor& source, const std::optional<Tensor>& target, const std::optional<Tensor>& inverse_norm,
    const std::optional<Tensor>& shift, const Tensor& index, const Tensor& vector);

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
