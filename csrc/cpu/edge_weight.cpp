// SPDX-License-Identifier: Apache-2.0
// softplus(vector . relu(source_i + target_j) + bias) for every edge, times exp(exponent) where there is one, and its
// gradients.
//
// No hidden activation is stored: the backward computes the ReLU's mask again. Every sum has one order, so the bits do
// not depend on the number of threads. Rows add their edges in ascending order, ends add theirs by the graph's columns.
// The gradient to `vector` adds partial sums of fixed chunks of rows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/grain.h"
#include "cpu/level.h"
#include "cpu/csc.h"
#include "cpu/softplus.h"
#include "cpu/vector.h"
#include "ops.h"

namespace drseg {
namespace {

// Rows whose contributions to the gradient of `vector` are summed before the others'.
constexpr int64_t kChunk = 64;

template <class T>
struct Edges {
  const T *source, *target, *vector;
  const int32_t* index;
  int64_t nodes, slots, hidden;
  T bias;
};

// Logits of kCount edges of one row: the row's half and `vector` are loaded once for all of them.
template <class T, int kBytes, int kCount>
DRSEG_INLINE void logits_of(const Edges<T>& edges, const T* source, const T* const* target, T* logit) {
  typedef Register<T, kBytes> R;
  const typename R::type zero = {};
  typename R::type sum[kCount] = {};
  int64_t e = 0;
  for (; e + R::lanes <= edges.hidden; e += R::lanes) {
    const auto own = R::load(source + e), vector = R::load(edges.vector + e);
    for (int n = 0; n < kCount; ++n) {
      const auto value = own + R::load(target[n] + e);
      // written so that NaN passes
      sum[n] += vector * (value < zero ? zero : value);
    }
  }
  for (int n = 0; n < kCount; ++n) {
    T rest = 0;
    for (int64_t d = e; d < edges.hidden; ++d) {
      const T value = source[d] + target[n][d];
      rest += edges.vector[d] * (value < 0 ? T(0) : value);
    }
    logit[n] = R::sum(sum[n]) + rest + edges.bias;
  }
}

template <class T, int kBytes>
DRSEG_INLINE void weigh_rows(
    Edges<T> edges, const bool* mask, const T* exponent, T* weight, int64_t first, int64_t last) {
  constexpr int kCount = 8;
  for (int64_t row = first; row < last; ++row) {
    const T* source = edges.source + row * edges.hidden;
    const T* sample = edges.target + row / edges.nodes * edges.nodes * edges.hidden;
    const int32_t* index = edges.index + row * edges.slots;
    T* out = weight + row * edges.slots;
    int64_t k = 0;
    for (; k + kCount <= edges.slots; k += kCount) {
      const T* target[kCount];
      for (int n = 0; n < kCount; ++n) target[n] = sample + clamp_index(index[k + n], edges.nodes) * edges.hidden;
      logits_of<T, kBytes, kCount>(edges, source, target, out + k);
    }
    for (; k < edges.slots; ++k) {
      const T* target = sample + clamp_index(index[k], edges.nodes) * edges.hidden;
      logits_of<T, kBytes, 1>(edges, source, &target, out + k);
    }
    softplus(out, edges.slots);
    const bool* present = mask == nullptr ? nullptr : mask + row * edges.slots;
    // a product, so that a row that is not finite stays visible
    if (exponent != nullptr)
      for (k = 0; k < edges.slots; ++k) {
        const T factor = exp_of(exponent[row * edges.slots + k]);
        // what padding has does not matter
        out[k] *= present == nullptr || present[k] ? factor : T(0);
      }
    else if (present != nullptr)
      for (k = 0; k < edges.slots; ++k) out[k] *= T(present[k]);
  }
}

// For kCount registers of hidden units of one node: the sum of slopes over the edges at whose other node the unit is
// on, times `vector`. With kVector also the sum of slope * unit, which goes to the gradient of `vector`.
template <class T, int kBytes, int kCount, bool kVector>
DRSEG_INLINE void add_active(
    const T* own, const T* rows, const int32_t* row, const T* slope, int64_t count, int64_t hidden, const T* vector,
    T* grad, T* grad_vector) {
  typedef Register<T, kBytes> R;
  const typename R::type zero = {};
  typename R::type unit[kCount], sum[kCount] = {}, total[kCount] = {};
  for (int n = 0; n < kCount; ++n) unit[n] = R::load(own + n * R::lanes);
  for (int64_t k = 0; k < count; ++k) {
    const T* other = rows + row[k] * hidden;
    const typename R::type share = zero + slope[k];
    for (int n = 0; n < kCount; ++n) {
      const auto value = unit[n] + R::load(other + n * R::lanes);
      sum[n] += value <= zero ? zero : share;
      if constexpr (kVector) total[n] += share * (value <= zero ? zero : value);
    }
  }
  for (int n = 0; n < kCount; ++n) {
    R::store(grad + n * R::lanes, sum[n] * R::load(vector + n * R::lanes));
    if constexpr (kVector)
      R::store(grad_vector + n * R::lanes, R::load(grad_vector + n * R::lanes) + total[n]);
  }
}

// The same for all hidden units of a node; those that fill no register one by one.
template <class T, int kBytes, bool kVector>
DRSEG_INLINE void add_all_active(
    const T* own, const T* rows, const int32_t* row, const T* slope, int64_t count, int64_t hidden, const T* vector,
    T* grad, T* grad_vector) {
  constexpr int64_t lanes = Register<T, kBytes>::lanes;
  int64_t e = 0;
  for (; e + 4 * lanes <= hidden; e += 4 * lanes)
    add_active<T, kBytes, 4, kVector>(
        own + e, rows + e, row, slope, count, hidden, vector + e, grad + e, kVector ? grad_vector + e : nullptr);
  for (; e + lanes <= hidden; e += lanes)
    add_active<T, kBytes, 1, kVector>(
        own + e, rows + e, row, slope, count, hidden, vector + e, grad + e, kVector ? grad_vector + e : nullptr);
  for (; e < hidden; ++e) {
    T sum = 0, total = 0;
    for (int64_t k = 0; k < count; ++k) {
      const T value = own[e] + rows[row[k] * hidden + e];
      sum += value <= 0 ? T(0) : slope[k];
      if constexpr (kVector) total += slope[k] * (value <= 0 ? T(0) : value);
    }
    grad[e] = sum * vector[e];
    if constexpr (kVector) grad_vector[e] += total;
  }
}

// Gradients to `source` and to `vector` of whole chunks of rows; `end` holds the clamped indices.
template <class T, int kBytes>
DRSEG_INLINE void source_chunks(
    Edges<T> edges, const T* slope, const int32_t* end, T* grad, T* vector_part, int64_t rows, int64_t first,
    int64_t last) {
  for (int64_t chunk = first; chunk < last; ++chunk) {
    T* part = vector_part + chunk * edges.hidden;
    std::fill_n(part, edges.hidden, T(0));
    for (int64_t row = chunk * kChunk; row < std::min(rows, (chunk + 1) * kChunk); ++row) {
      const T* sample = edges.target + row / edges.nodes * edges.nodes * edges.hidden;
      add_all_active<T, kBytes, true>(
          edges.source + row * edges.hidden, sample, end + row * edges.slots, slope + row * edges.slots, edges.slots,
          edges.hidden, edges.vector, grad + row * edges.hidden, part);
    }
  }
}

// Gradient to `target` of some nodes of one sample, whose `slope`, `source`, `target` and `grad` these are.
template <class T, int kBytes>
DRSEG_INLINE void target_nodes(
    Edges<T> edges, const Csc* csc, const T* slope, const T* source, const T* target, T* grad, int64_t first,
    int64_t last) {
  std::vector<T> ordered;
  std::vector<int32_t> start;
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = csc->indptr[node], count = csc->indptr[node + 1] - begin;
    ordered.resize(count);
    start.resize(count);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t edge = csc->edge(begin + n);
      ordered[n] = slope[edge];
      start[n] = csc->start(edge);
    }
    add_all_active<T, kBytes, false>(
        target + node * edges.hidden, source, start.data(), ordered.data(), count, edges.hidden,
        edges.vector, grad + node * edges.hidden, nullptr);
  }
}

template <class T, int kBytes>
DRSEG_INLINE void slopes(const T* grad, const T* weight, T* slope, int64_t first, int64_t last) {
  softplus_slope(grad + first, weight + first, slope + first, last - first);
}

// The same with exponents, and the gradient to these.
template <class T, int kBytes>
DRSEG_INLINE void slopes_and_exponents(
    const T* grad, const T* weight, const T* exponent, T* slope, T* grad_exponent, int64_t first, int64_t last) {
  scaled_slope(grad + first, weight + first, exponent + first, slope + first, last - first);
  for (int64_t n = first; n < last; ++n) grad_exponent[n] = grad[n] * weight[n];
}

DRSEG_LEVELS(weigh, weigh_rows)
DRSEG_LEVELS(source_gradient, source_chunks)
DRSEG_LEVELS(target_gradient, target_nodes)
DRSEG_LEVELS(slope_of, slopes)
DRSEG_LEVELS(scaled_slope_of, slopes_and_exponents)

template <class T>
Edges<T> edges_of(const Tensor& source, const Tensor& target, const Tensor& index, const Tensor& vector, T bias) {
  return {source.const_data_ptr<T>(), target.const_data_ptr<T>(), vector.const_data_ptr<T>(),
          index.const_data_ptr<int32_t>(), source.size(1), index.size(2), source.size(2), bias};
}

template <class T>
void forward(
    const Tensor& source, const Tensor& target, const Tensor& index, const Tensor& vector, const Tensor& bias,
    const bool* mask, const std::optional<Tensor>& exponent, Tensor& weight) {
  const Edges<T> edges = edges_of<T>(source, target, index, vector, *bias.const_data_ptr<T>());
  const T* power = exponent.has_value() ? exponent->const_data_ptr<T>() : nullptr;
  T* out = weight.mutable_data_ptr<T>();
  torch::stable::parallel_for(
      0, source.size(0) * edges.nodes, grain(edges.slots * edges.hidden), [&](int64_t first, int64_t last) {
        DRSEG_CALL(weigh, T, edges, mask, power, out, first, last);
      });
}

template <class T>
void backward(
    const Tensor& grad, const Tensor& weight, const Tensor& source, const Tensor& target, const Tensor& index,
    const Tensor& vector, const Columns& columns, const std::optional<Tensor>& exponent, Tensor& grad_source,
    Tensor& grad_target, Tensor& grad_vector, Tensor& grad_bias, Tensor& grad_exponent) {
  const Edges<T> edges = edges_of<T>(source, target, index, vector, T(0));
  const int64_t batch = source.size(0), rows = batch * edges.nodes, count = rows * edges.slots;
  const auto slope = std::make_unique_for_overwrite<T[]>(count);
  const auto end = std::make_unique_for_overwrite<int32_t[]>(count);
  const T *outer = grad.const_data_ptr<T>(), *value = weight.const_data_ptr<T>();
  const T* power = exponent.has_value() ? exponent->const_data_ptr<T>() : nullptr;
  T* to_exponent = grad_exponent.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, count, 16384, [&](int64_t first, int64_t last) {
    if (power == nullptr) {
      DRSEG_CALL(slope_of, T, outer, value, slope.get(), first, last);
    } else {
      DRSEG_CALL(scaled_slope_of, T, outer, value, power, slope.get(), to_exponent, first, last);
    }
    for (int64_t e = first; e < last; ++e) end[e] = static_cast<int32_t>(clamp_index(edges.index[e], edges.nodes));
  });

  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  const auto part = std::make_unique_for_overwrite<T[]>(chunks * edges.hidden);
  T* to_source = grad_source.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    DRSEG_CALL(source_gradient, T, edges, slope.get(), end.get(), to_source, part.get(), rows, first, last);
  });
  T* to_vector = grad_vector.mutable_data_ptr<T>();
  std::fill_n(to_vector, edges.hidden, T(0));
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t e = 0; e < edges.hidden; ++e) to_vector[e] += part[chunk * edges.hidden + e];

  T* to_target = grad_target.mutable_data_ptr<T>();
  for_ends(
      edges.index, columns, batch, edges.nodes, edges.slots, grain(edges.slots * edges.hidden),
      [&](int64_t b, const Csc& csc, int64_t first, int64_t last) {
        const int64_t offset = b * edges.nodes * edges.hidden;
        const T* given = slope.get() + b * edges.nodes * edges.slots;
        DRSEG_CALL(
            target_gradient, T, edges, &csc, given, edges.source + offset, edges.target + offset,
            to_target + offset, first, last);
      });
  *grad_bias.mutable_data_ptr<T>() = T(std::accumulate(slope.get(), slope.get() + count, double(0)));
}

ScalarType check(
    const char* op, const Tensor& source, const Tensor& target, const Tensor& index, const Tensor& vector) {
  const ScalarType dtype = check_floating(op, source);
  check_operand(op, "source", source, 3, dtype);
  check_operand(op, "target", target, 3, dtype);
  check_operand(op, "index", index, 3, ScalarType::Int);
  check_operand(op, "vector", vector, 1, dtype);
  check_leading(op, "target", target, source);
  check_leading(op, "index", index, source);
  STD_TORCH_CHECK(
      target.size(2) == source.size(2) && vector.size(0) == source.size(2), op, ": operands differ in E");
  return dtype;
}

void check_exponent(
    const char* op, const std::optional<Tensor>& exponent, const Tensor& index, ScalarType dtype) {
  if (!exponent.has_value()) return;
  check_operand(op, "exponent", *exponent, 3, dtype);
  check_leading(op, "exponent", *exponent, index);
  STD_TORCH_CHECK(exponent->size(2) == index.size(2), op, ": exponent and index differ in K");
}

}  // namespace

Tensor edge_weight(
    const Tensor& source, const Tensor& target, const Tensor& index, const Tensor& vector, const Tensor& bias,
    std::optional<Tensor> mask, std::optional<Tensor> exponent) {
  constexpr const char* op = "drseg_native::edge_weight";
  const ScalarType dtype = check(op, source, target, index, vector);
  STD_TORCH_CHECK(bias.numel() == 1 && bias.scalar_type() == dtype, op, ": bias is not one number of source's dtype");
  if (mask.has_value()) {
    check_operand(op, "mask", *mask, 3, ScalarType::Bool);
    check_leading(op, "mask", *mask, index);
    STD_TORCH_CHECK(mask->size(2) == index.size(2), op, ": mask and index differ in K");
  }
  check_exponent(op, exponent, index, dtype);
  Tensor weight = drseg::allocate(source, {index.size(0), index.size(1), index.size(2)});
  if (weight.numel() == 0) return weight;
  const bool* present = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  if (dtype == ScalarType::Double) {
    forward<double>(source, target, index, vector, bias, present, exponent, weight);
  } else {
    forward<float>(source, target, index, vector, bias, present, exponent, weight);
  }
  return weight;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> edge_weight_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& source, const Tensor& target, const Tensor& index,
    const Tensor& vector, std::optional<Tensor> indptr, std::optional<Tensor> perm, std::optional<Tensor> exponent) {
  constexpr const char* op = "drseg_native::edge_weight_backward";
  const ScalarType dtype = check(op, source, target, index, vector);
  check_operand(op, "grad", grad, 3, dtype);
  check_operand(op, "weight", weight, 3, dtype);
  for (const Tensor* tensor : {&grad, &weight}) {
    check_leading(op, "grad or weight", *tensor, index);
    STD_TORCH_CHECK(tensor->size(2) == index.size(2), op, ": grad, weight and index differ in K");
  }
  check_exponent(op, exponent, index, dtype);
  const Columns columns = check_columns(op, indptr, perm, index);
  Tensor grad_source = drseg::allocate_like(source), grad_target = drseg::allocate_like(target);
  Tensor grad_vector = drseg::allocate_like(vector), grad_bias = drseg::allocate(vector, {1});
  Tensor grad_exponent = exponent.has_value() ? drseg::allocate_like(grad) : drseg::allocate(grad, {0});
  if (dtype == ScalarType::Double) {
    backward<double>(
        grad, weight, source, target, index, vector, columns, exponent, grad_source, grad_target, grad_vector,
        grad_bias, grad_exponent);
  } else {
    backward<float>(
        grad, weight, source, target, index, vector, columns, exponent, grad_source, grad_target, grad_vector,
        grad_bias, grad_exponent);
  }
  return {grad_source, grad_target, grad_vector, grad_bias, grad_exponent};
}

}  // namespace drseg
