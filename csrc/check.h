// SPDX-License-Identifier: Apache-2.0
// What a kernel relies on before it touches memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>

namespace drseg {

using torch::headeronly::ScalarType;

inline void check_operand(
    const char* op, const char* name, const torch::stable::Tensor& tensor, int64_t rank, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == rank, op, ": ", name, " has rank ", tensor.dim(), "; expected ", rank);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " is not contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " has an unexpected dtype");
}

inline void check_leading(
    const char* op, const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(
      tensor.size(0) == like.size(0) && tensor.size(1) == like.size(1),
      op, ": ", name, " does not match in its first two dimensions");
}

inline ScalarType check_floating(const char* op, const torch::stable::Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": expected float32 or float64 operands");
  return dtype;
}

// Memory for a result. If there is none, torch 2.10 says so only in its log, but the error must say it too.
inline torch::stable::Tensor allocate(
    const torch::stable::Tensor& like,
    torch::headeronly::IntHeaderOnlyArrayRef size,
    std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, size, dtype);
  } catch (const std::exception& error) {
    if (std::strstr(error.what(), "memory") != nullptr) throw;
    throw std::runtime_error(std::string("DefaultCPUAllocator: can't allocate memory: ") + error.what());
  }
}

inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& like) { return allocate(like, like.sizes()); }

// An index that the caller did not validate stays inside the tensor.
inline int64_t clamp_index(int32_t value, int64_t nodes) {
  return value < 0 ? 0 : (value >= nodes ? nodes - 1 : value);
}

}  // namespace drseg
