// SPDX-License-Identifier: Apache-2.0
// What the operators of this folder share on the host: checks, views of tensors, the stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "cuda/operators.h"
#include "cuda/warp.cuh"

namespace drseg::cuda {

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

// Whether the rows of an edge MLP are bfloat16, all of whose operands are right.
bool check_halves(
    const char* op, const Tensor& source, const std::optional<Tensor>& target, const std::optional<Tensor>& inverse_norm,
    const std::optional<Tensor>& shift, const Tensor& index, const Tensor& vector);

}  // namespace drseg::cuda
