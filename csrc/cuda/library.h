// SPDX-License-Identifier: Apache-2.0
// What the operators of this folder share on the host: checks, views of tensors, the stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "check.h"
#include "cuda/device.h"

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

}  // namespace drseg::cuda
